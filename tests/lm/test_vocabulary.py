"""Vocabularies inside GGUF files against the tokenizers they came from, and SentencePiece's rule done slowly."""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from byte_tokenizer import PIECES, lines
from hypothesis import example, given
from hypothesis import strategies as st

from rung.core.errors import ModelError
from rung.lm.weights.vocabulary import tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

GUIDE = Path(__file__).parents[2] / "docs" / "guide"
CONTROL = ["<|begin|>", "<|end|>", "<|im_start|>"]
TRICKY = [
    *PIECES, "it's HE'LL we\u2019re'd", "a  b   c\n\n \n d\t\te \r\n\r\n", "1234567 12 ½\uff13x1y22",
    "e\u0301 Å A\u030a", "\u3000a\u00a0b", "<|begin|> <|end|>", "<think>x</think>", " ", "", "  lead", "trail  ",
    "...!?\n\n\nA", "\u017f \u0131 'S '\u017f", "__x__ $5.00 <a=b>",
]  # fmt: skip
# as their tokenizer.json files write them
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def text() -> list[str]:
    return [*(path.read_text() for path in sorted(GUIDE.glob("*.md"))[:6]), *lines(200)]


def llama3_cut():
    split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def smollm_cut():
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


@cache
def trained(pre: str):
    """A byte-level BPE of 900 tokens, trained with the family's own cuts; and its tokenizer of transformers."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    cuts = {"llama-bpe": llama3_cut, "smollm": smollm_cut, "gpt-2": pre_tokenizers.ByteLevel}
    if pre == "qwen2":
        theirs = transformers.Qwen2Tokenizer()._tokenizer
        made.normalizer, made.pre_tokenizer = theirs.normalizer, theirs.pre_tokenizer
    else:
        made.pre_tokenizer = cuts[pre](add_prefix_space=False) if pre == "gpt-2" else cuts[pre]()
    made.decoder = decoders.ByteLevel()
    first = CONTROL if pre == "smollm" else []  # SmolLM2 has them in front, the others behind
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=first, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(text(), trainer)
    model = json.loads(made.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(m) for m in model["merges"]]
    if pre in ("qwen2", "gpt-2"):
        kind = transformers.Qwen2Tokenizer if pre == "qwen2" else transformers.GPT2Tokenizer
        special = dict(zip(("unk_token", "eos_token", "pad_token"), CONTROL, strict=True))
        theirs = kind(vocab=dict(vocab), merges=list(merges), bos_token=CONTROL[0], **special)
    else:
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
        theirs.add_tokens([tokenizers.AddedToken(token, special=True) for token in CONTROL])
    theirs.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    return theirs, merges


def facts_of(pre: str) -> dict:
    """What a converter writes into a GGUF's metadata."""
    theirs, merges = trained(pre)
    words = [theirs.convert_ids_to_tokens(i) for i in range(len(theirs))]
    kinds = [3 if word in CONTROL else 4 if word == "<think>" else 1 for word in words]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
    }  # fmt: skip


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm", "gpt-2"])
def test_a_byte_level_vocabulary_gives_the_ids_of_the_tokenizer_it_came_from(pre):
    theirs, _ = trained(pre)
    ours = tokenizer(facts_of(pre), where="test")
    for line in [*TRICKY, *lines(500)]:
        ids = theirs.encode(line, add_special_tokens=False)
        assert ours.encode(line, add_special_tokens=False).ids == ids, line
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


def test_the_families_cut_text_differently_so_that_a_mistaken_one_would_be_seen():
    line = "12345 HE'LL e\u0301\n\n x"
    made = [tokenizer(facts_of(pre), where="") for pre in ("llama-bpe", "qwen2", "smollm", "gpt-2")]
    assert len({tuple(each.pre_tokenizer.pre_tokenize_str(line)) for each in made}) == 4


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2"])
def test_no_plain_text_becomes_a_control_token(pre):
    ours = tokenizer(facts_of(pre), where="test")
    ours.encode_special_tokens = True
    control = {ours.token_to_id(token) for token in CONTROL}
    for word in CONTROL:
        for line in (word, f"a{word}", f"{word} b", word[1:]):
            assert not control & set(ours.encode(line, add_special_tokens=False).ids)


def test_a_control_token_of_letters_is_no_word_where_whole_words_are_tokens():
    facts = facts_of("llama-bpe")
    facts["tokenizer.ggml.tokens"] = [*facts["tokenizer.ggml.tokens"], "STOPNOW"]
    facts["tokenizer.ggml.token_type"] = [*facts["tokenizer.ggml.token_type"], 3]
    ours = tokenizer(facts, where="test")
    assert ours.encode("STOPNOW").ids == [ours.token_to_id("STOPNOW")]
    ours.encode_special_tokens = True
    assert ours.token_to_id("STOPNOW") not in ours.encode("STOPNOW").ids


def test_words_that_are_tokens_stay_whole_only_where_their_family_says_so():
    """`ignore_merges` of Llama 3: a word without merges that lead to it."""
    for pre, whole in (("llama-bpe", True), ("qwen2", False)):
        facts = facts_of(pre)
        index = facts["tokenizer.ggml.tokens"].index("z")
        facts["tokenizer.ggml.tokens"][facts["tokenizer.ggml.tokens"].index("the")] = "zzqzz"
        kept = [
            m for m in facts["tokenizer.ggml.merges"] if "z" not in m and "the" not in (*m.split(), m.replace(" ", ""))
        ]
        facts["tokenizer.ggml.merges"] = kept
        ids = tokenizer(facts, where="test").encode("zzqzz").ids
        assert (len(ids) == 1) == whole
        assert whole or ids.count(index) == 4


def test_padding_behind_the_vocabulary_takes_no_number_away():
    facts = facts_of("qwen2")
    plain = tokenizer(facts, where="test")
    facts["tokenizer.ggml.tokens"] = facts["tokenizer.ggml.tokens"] + [f"[PAD{i}]" for i in range(5)]
    facts["tokenizer.ggml.token_type"] = facts["tokenizer.ggml.token_type"] + [5] * 5
    padded = tokenizer(facts, where="test")
    assert padded.get_vocab() == plain.get_vocab()


def test_default_is_what_llama_cpp_falls_back_to():
    facts = facts_of("gpt-2") | {"tokenizer.ggml.pre": "default"}
    cut = tokenizer(facts, where="test").pre_tokenizer.pre_tokenize_str
    assert [word for word, _ in cut("ab12345 c<=d")] == ["ab", "123", "45", "Ġc", "<=", "d"]
    del facts["tokenizer.ggml.pre"]
    assert tokenizer(facts, where="test").pre_tokenizer.pre_tokenize_str("12345") == cut("12345")


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_texts_begin_and_end_with_the_tokens_that_the_file_asks_for(bos, eos):
    facts = facts_of("llama-bpe")
    begin, end = (facts["tokenizer.ggml.tokens"].index(token) for token in CONTROL[:2])
    facts |= {"tokenizer.ggml.bos_token_id": begin, "tokenizer.ggml.eos_token_id": end}
    facts |= {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    ours = tokenizer(facts, where="test")
    inside = ours.encode("the text", add_special_tokens=False).ids
    assert ours.encode("the text").ids == [begin] * bos + inside + [end] * eos


# --- SentencePiece


@cache
def pieces() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores, types as Llama 2 has them: unknown, control, bytes, then merges by rank, then letters."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, limit_alphabet=70, max_token_length=6)
    made.train_from_iterator([piece for line in text()[:3] for piece in line.split("\n")], trainer)
    model = json.loads(made.to_str())["model"]
    joined = list(dict.fromkeys("".join(merge) for merge in model["merges"]))
    letters = [word for word in model["vocab"] if word not in joined] + ["<", "/", "s", ">"]
    letters = list(dict.fromkeys(letters))
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *joined, "</", "s>", *letters]
    words = list(dict.fromkeys(words))
    scores = [0.0] * 259 + [-float(i) for i in range(len(words) - 259)]
    return words, scores, [2, 3, 3, *[6] * 256, *[1] * (len(words) - 259)]


def spm_facts() -> dict:
    words, scores, kinds = pieces()
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": words, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.bos_token_id": 1,
    }  # fmt: skip


def slow_sentence_piece(line: str) -> list[int]:
    """Join the neighbours whose union has the best score, the leftmost first, until none is a token; then bytes."""
    words, scores, kinds = pieces()
    number = {word: i for i, word in enumerate(words) if kinds[i] == 1}
    symbols = list("▁" + line.replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in pairwise(symbols)]
        found = [(-scores[number[word]], at) for at, word in enumerate(joined) if word in number]
        if not found:
            break
        _, at = min(found)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids: list[int] = []
    for symbol in symbols:
        ids += [number[symbol]] if symbol in number else [3 + byte for byte in symbol.encode()]
    return ids


@given(st.lists(st.sampled_from([*"aeinrst the  \n#`.é日", "the", "ing", "</s>", "<0x0A>", "😀"]), max_size=30))
@example(["</s>"])
@example(["  two  spaces "])
@example([])
@example(["<0x0A>\n"])
def test_a_sentence_piece_vocabulary_joins_what_scores_best(parts):
    line = "".join(parts)
    ours = _ours()
    expected = slow_sentence_piece(line) if line else []
    assert ours.encode(line, add_special_tokens=False).ids == expected
    assert ours.decode(expected, skip_special_tokens=False) == line


@cache
def _ours():
    made = tokenizer(spm_facts(), where="test")
    made.encode_special_tokens = True
    return made


def test_a_sentence_piece_vocabulary_gives_the_ids_of_transformers():
    words, scores, kinds = pieces()
    from transformers.convert_slow_tokenizer import generate_merges

    vocab = {word: i for i, word in enumerate(words)}
    skipped = [word for word, kind in zip(words, kinds, strict=True) if kind != 1]
    merges = generate_merges(vocab, dict(zip(words, scores, strict=True)), skipped)
    theirs = transformers.LlamaTokenizer(vocab=vocab, merges=merges)
    ours = tokenizer(spm_facts(), where="test")
    for line in [line.lstrip() for line in [*TRICKY, *lines(300)]]:  # theirs adds no second space before a space
        if "<|" not in line and line:
            assert ours.encode(line).ids == [1, *theirs.encode(line, add_special_tokens=False)], line


def test_text_never_becomes_a_byte_or_a_control_token_of_sentence_piece():
    ours = _ours()
    assert 2 not in ours.encode("</s>", add_special_tokens=False).ids
    assert ours.encode("<0x0A>").ids != ours.encode("\n").ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "t5"}, "kind 'gpt2' or 'llama', found 't5'"),
        ({"pre": "tekken"}, "unknown pre-tokenizer 'tekken'"),
        ({"tokens": ["a", "a"]}, "a token stands there twice"),
        ({"token_type": [1]}, "tokens and 1 types"),
        ({"merges": ["a"]}, "the vocabulary cannot be used"),
        ({"merges": ["Ġ zzz"]}, "the vocabulary cannot be used"),
        ({"merges": None}, "the vocabulary cannot be used"),
        ({"tokens": None}, "the vocabulary cannot be used"),
        ({"add_bos_token": True, "bos_token_id": 10**9}, "the vocabulary cannot be used"),
    ],
)
def test_a_vocabulary_that_is_not_whole_is_refused(change, message):
    facts = facts_of("qwen2") | {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    with pytest.raises(ModelError, match=message):
        tokenizer(facts, where="test")
