"""Text in, text out, on a model whose next token we choose: token t is followed by t + 1, surely or by a coin."""

import pytest
import torch
from byte_tokenizer import BYTES

from rung.core.errors import ModelError, RequestError
from rung.core.words import Message
from rung.lm import presets
from rung.lm.decoder import Decoder
from rung.model import new_model
from rung.model.generate import generate, stream
from rung.text.pretrained import Tokenizer

CONTEXT = 48
FIRST, LAST = BYTES.encode("a")[0], BYTES.encode("y")[0]
CHAT = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}<s>a"


def alphabet(template: str | None = None, sharpness: float = 50.0):
    """A decoder that continues the alphabet: a byte is followed by the next one, `y` by </s>; blocks do nothing.

    With embedding e_t (one-hot) and head rows w_{t+1} = sharpness * e_t, logit t+1 is sharpness * |norm(e_t)|.
    """
    config = presets.llama(
        vocab_size=258, width=258, layers=1, heads=3, kv_heads=1, ffn_width=4, tied=False, max_positions=CONTEXT
    )
    decoder = Decoder(config).init_(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in decoder.blocks.parameters():
            parameter.zero_()
        decoder.embedding.weight.copy_(torch.eye(258))
        decoder.unembedding.weight.copy_(torch.roll(torch.eye(258), 1, 0) * sharpness)
        decoder.unembedding.weight[257] = sharpness * torch.eye(258)[LAST]
        decoder.unembedding.weight[LAST + 1] = 0
    names = {"bos_token": "<s>"}
    return new_model(decoder, text=Tokenizer(BYTES._plain, eos_ids=(257,), names=names, template=template))


def coin():
    """A model that is not sure: many tokens are likely."""
    return alphabet(sharpness=0.15)


def test_the_alphabet_ends_with_an_end_token_that_is_kept_in_the_ids_and_not_in_the_text():
    (made,) = generate(alphabet(), ["ab"], temperature=0.0, max_tokens=40)
    assert (made.text, made.stop) == ("cdefghijklmnopqrstuvwxy", "eos")
    assert made.token_ids == (*BYTES.encode(made.text), 257)
    assert len(made.logp_sampled) == len(made.token_ids)


def test_max_tokens_cuts():
    (made,) = generate(alphabet(), ["ab"], temperature=0.0, max_tokens=3)
    assert (made.text, made.stop) == ("cde", "length")


@pytest.mark.parametrize("stop", [["gh"], ["zz", "gh"], ["gh", "fgh!"], ["gh", "ghi"]])
def test_text_ends_before_the_stop_string_and_the_ids_hold_it(stop):
    (made,) = generate(alphabet(), ["ab"], temperature=0.0, stop=stop, max_tokens=40)
    assert (made.text, made.stop) == ("cdef", "stop")
    assert BYTES.decode(made.token_ids) == "cdefgh"


def test_a_stop_string_in_the_prompt_stops_nothing():
    (made,) = generate(alphabet(), ["gh"], temperature=0.0, stop=["gh", "hi"], max_tokens=40)
    assert made.text.startswith("ijk")


def test_a_control_token_may_be_a_stop_string():
    model = alphabet()
    with torch.no_grad():
        model.decoder.unembedding.weight[256] = 99 * torch.eye(258)[FIRST + 5]  # f is followed by <s>
    (made,) = generate(model, ["ab"], temperature=0.0, stop=["<s>"], max_tokens=40)
    assert (made.text, made.stop, made.token_ids[-1]) == ("cdef", "eos", 256)


def test_a_string_is_a_user_message_where_there_is_a_template_and_plain_text_where_not():
    model, plain = alphabet(CHAT), alphabet()
    (said,) = generate(model, ["x"], temperature=0.0, max_tokens=2)
    assert said.text == "bc"  # after the template's own "a"
    (continued,) = generate(model, ["d"], temperature=0.0, max_tokens=2, chat=False)
    assert continued.text == "ef"
    assert generate(plain, ["d"], temperature=0.0, max_tokens=2)[0].text == "ef"
    (turns,) = generate(model, [[Message("user", "x"), Message("assistant", "de")]], temperature=0.0, max_tokens=2)
    assert turns.text == "fg"  # the answer goes on where its own words end
    with pytest.raises(ModelError, match="no chat template"):
        generate(plain, ["d"], chat=True)


def test_a_generation_depends_on_its_seed_and_place_and_not_on_the_prompts_beside_it():
    model = coin()
    options = {"max_tokens": 12, "temperature": 1.0}
    both = generate(model, ["ab", "ab"], seed=3, **options)
    assert both[0].token_ids != both[1].token_ids  # keys differ by place
    assert generate(model, ["ab"], seed=3, **options)[0].token_ids == both[0].token_ids
    assert generate(model, ["ab"], seed=4, **options)[0].token_ids != both[0].token_ids
    given = generate(model, ["xyz", "ab", "ab"], seeds=[8, 9, 9], **options)
    assert given[1].token_ids == given[2].token_ids
    assert generate(model, ["ab"], seeds=[9], **options)[0].token_ids == given[1].token_ids


def test_logp_sampled_is_the_models_own_log_probability_at_temperature_one():
    model = coin()
    (made,) = generate(model, ["ab"], max_tokens=6, seed=1)
    ids = [*BYTES.encode("ab"), *made.token_ids]
    logp_TV = model.logits(torch.tensor([ids]))[0].log_softmax(-1)
    expected = [float(logp_TV[at, ids[at + 1]]) for at in range(1, len(ids) - 1)]
    assert made.logp_sampled == pytest.approx(expected, abs=1e-4)


def test_filters_reach_the_sampler():
    model = coin()
    greedy = generate(model, ["ab"], max_tokens=8, temperature=0.0)[0].token_ids
    for option in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert generate(model, ["ab"], max_tokens=8, seed=5, **option)[0].token_ids == greedy
    assert generate(model, ["ab"], max_tokens=8, seed=5)[0].token_ids != greedy


@pytest.mark.parametrize("stop", [[], ["gh"], ["h", "ghx"], ["cdq"], ["wxyz"]])
@pytest.mark.parametrize("make", [alphabet, coin])
def test_streamed_pieces_join_to_the_generated_text(make, stop):
    model, size = make(), 30 if make is alphabet else 10
    (made,) = generate(model, ["ab"], max_tokens=size, seed=2, stop=stop)
    pieces = list(stream(model, "ab", max_tokens=size, seed=2, stop=stop))
    assert "".join(pieces) == made.text
    assert all(pieces)
    if make is alphabet:
        assert len(pieces) >= 3  # it does come in pieces


def test_no_prompts_give_no_generations():
    assert generate(alphabet(), []) == []


def test_a_prompt_beyond_the_context_is_refused_with_both_lengths():
    with pytest.raises(RequestError, match=rf"must fit the model's {CONTEXT} positions; 60 \+ 5 came"):
        generate(alphabet(), ["a" * 60], max_tokens=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "hello"}, r"prompts needs a list; the string 'hello' came\. Write \['hello'\]"),
        ({"seeds": [1, 2]}, r"seeds needs one number per prompt: 1; 2 came"),
        ({"stop": "ab"}, r"stop needs a list of strings that are not empty; 'ab' came"),
        ({"stop": [""]}, r"stop needs a list of strings that are not empty"),
        ({"prompts": [""]}, r"a prompt of at least one token is needed"),
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or positive"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"max_tokens": 0}, r"max_tokens must be at least 1"),
    ],
)
def test_a_request_that_cannot_be_served_says_what_was_needed(options, message):
    with pytest.raises(RequestError, match=message):
        generate(alphabet(), **{"prompts": ["ab"], "max_tokens": 4} | options)
