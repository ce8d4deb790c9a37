"""Text to ids and back, against transformers on the packaged model, and exactly on a tokenizer made here."""

from pathlib import Path

import pytest
from byte_tokenizer import BYTES, lines
from hypothesis import example, given
from hypothesis import strategies as st

from rung.core.errors import ModelError
from rung.lm.weights.files import COMPANIONS, read_files, read_json
from rung.text.pretrained import TextStream, Tokenizer, stop_matcher


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: Path) -> Tokenizer:
    files = read_files(smollm2_folder, COMPANIONS)
    return Tokenizer.from_files(files, read_json(smollm2_folder / "config.json"), where="smollm2")


def test_ten_thousand_lines_get_the_ids_of_transformers_and_come_back(smollm2, smollm2_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    wanted = lines(10_000)
    assert len(set(wanted)) > 9_900
    for line, ids in zip(wanted, theirs(wanted)["input_ids"], strict=True):
        assert smollm2.encode(line) == ids, line
        assert smollm2.decode(ids, skip_special_tokens=False) == line


def test_digits_are_single_tokens_of_the_packaged_model(smollm2):
    assert [smollm2.token_of(i) for i in smollm2.encode("12 345")] == ["1", "2", "Ġ", "3", "4", "5"]


def test_the_packaged_model_ends_with_its_end_of_turn(smollm2):
    assert [smollm2.token_of(i) for i in smollm2.eos_ids] == ["<|im_end|>"]


def test_a_control_token_written_in_a_text_stays_text(smollm2):
    control = set(smollm2.special.values())
    for token in smollm2.special:
        for text in (token, f"a{token}b", f" {token} ", token * 3):
            ids = smollm2.encode(text)
            assert not control & set(ids)
            assert smollm2.decode(ids) == text
            assert control & set(smollm2.encode_control(text))  # else the test could not fail


@given(st.lists(st.integers(0, 257), max_size=60))
def test_streamed_pieces_join_to_the_decoded_whole(ids):
    stream = TextStream(BYTES)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == BYTES.decode(ids)


@given(st.text(max_size=30))
def test_streamed_pieces_of_valid_text_hold_whole_characters_only(text):
    stream = TextStream(BYTES)
    pieces = [stream.push(i) for i in BYTES.encode(text)]
    assert "".join(pieces) + stream.flush() == text
    assert all("�" not in piece for piece in pieces if "�" not in text)


@given(st.lists(st.sampled_from([0, 1, 2]), max_size=8))
@example([0, 2, 1])
def test_a_decoder_that_looks_at_the_token_before_keeps_its_spaces(ids):
    import tokenizers
    from tokenizers import decoders, models

    made = tokenizers.Tokenizer(models.BPE(vocab={"▁a": 0, "▁b": 1}, merges=[]))
    made.decoder = decoders.Metaspace()  # drops the space of the first token it sees
    made.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(made, eos_ids=(), names={})
    stream = TextStream(tokenizer)
    assert "".join([*(stream.push(i) for i in ids), stream.flush()]) == tokenizer.decode(ids)


@given(st.text("abé😀", max_size=20), st.lists(st.text("abé😀", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_matches_at_the_very_token_that_completes_it(text, stops):
    matches = stop_matcher(BYTES, stops)()
    ids = BYTES.encode(text)
    first = next((n for n in range(1, len(ids) + 1) if any(s in BYTES.decode(ids[:n]) for s in stops)), None)
    assert next((n for n, i in enumerate(ids, 1) if matches(i)), None) == first


def test_samples_do_not_share_a_matchers_memory():
    new = stop_matcher(BYTES, ["ab"])
    one, other = new(), new()
    a, b = BYTES.encode("ab")
    assert not one(a)
    assert not other(b)
    assert one(b)


def test_ends_are_collected_from_all_three_files():
    tokenizer_json = BYTES._plain.to_str().encode()
    files = {
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": b'{"eos_token": {"content": "</s>"}, "chat_template": "T"}',
        "generation_config.json": b'{"eos_token_id": [7, 9]}',
    }
    made = Tokenizer.from_files(files, {"eos_token_id": 9}, where="here")
    assert made.eos_ids == (9, 7, 257)
    assert made.template == "T"
    assert made.names == {"eos_token": "</s>"}
    newer = Tokenizer.from_files(files | {"chat_template.jinja": b"J"}, {}, where="here")
    assert newer.template == "J"
    assert newer.eos_ids == (7, 9, 257)


def test_a_tokenizer_that_cannot_be_read_names_its_folder():
    with pytest.raises(ModelError, match=r"here has no tokenizer\.json"):
        Tokenizer.from_files({}, {}, where="here")
    with pytest.raises(ModelError, match=r"here: the tokenizer's files cannot be used"):
        Tokenizer.from_files({"tokenizer.json": b"{"}, {}, where="here")
    good = {"tokenizer.json": BYTES._plain.to_str().encode()}
    with pytest.raises(ModelError, match=r"here: tokenizer_config\.json is not JSON"):
        Tokenizer.from_files(good | {"tokenizer_config.json": b"{"}, {}, where="here")


def test_unknown_tokens_are_errors():
    with pytest.raises(ModelError, match=r"no token '<end>'"):
        BYTES.id_of("<end>")
    with pytest.raises(ModelError, match="no token number 258; it has 258"):
        BYTES.token_of(258)
    assert BYTES.token_of(BYTES.id_of("</s>")) == "</s>"


def test_a_begin_token_is_added_on_demand_only():
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    made = tokenizers.Tokenizer.from_str(BYTES._plain.to_str())
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = Tokenizer(made, eos_ids=(), names={})
    plain = BYTES.encode("a<s>")
    assert tokenizer.encode("a<s>") == plain
    assert tokenizer.encode("a<s>", add_special_tokens=True) == [256, *plain]
    assert tokenizer.encode_control("a<s>") == [*BYTES.encode("a"), 256]  # a template writes its own
