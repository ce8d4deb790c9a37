"""Tokenizer files that lie: each loads or is refused, and none crashes."""

import json
import random

import pytest
from byte_tokenizer import BYTES
from hypothesis import given, settings
from hypothesis import strategies as st

from rung.core.errors import ModelError
from rung.text.pretrained import Tokenizer

GOOD = {
    "tokenizer.json": BYTES._plain.to_str().encode(),
    "tokenizer_config.json": b'{"eos_token": {"content": "</s>"}, "bos_token": "<s>", "chat_template": "x"}',
    "generation_config.json": b'{"eos_token_id": [257, 256]}',
}


def read(files: dict[str, bytes], config: dict | None = None) -> Tokenizer:
    return Tokenizer.from_files(files, config or {}, where="here")


def test_the_files_that_are_spoilt_below_are_good():
    made = read(GOOD)
    assert (made.eos_ids, made.names, made.template) == ((257, 256), {"eos_token": "</s>", "bos_token": "<s>"}, "x")


DEEP = b"[" * 200_000 + b"]" * 200_000
SPOILT = {
    "tokenizer.json": [b"", b"{}", b"[]", b"null", DEEP, b"\xff", b'{"model": {"type": "BPE"}}', b'{"version": "9"}'],
    "tokenizer_config.json": [
        b"", b"[]", b"1", DEEP, b"\xff", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b'{"chat_template": 7}',
        b'{"chat_template": [1]}', b'{"chat_template": [{"name": "default"}]}', b'{"chat_template": {"default": "x"}}',
    ],
    "generation_config.json": [
        b"[]", b'{"eos_token_id": "</s>"}',
        b'{"eos_token_id": {"a": 1}}', b'{"eos_token_id": [[1]]}', b'{"eos_token_id": true}',
        b'{"eos_token_id": -1}', b'{"eos_token_id": 1.5}', DEEP,
    ],
    "chat_template.jinja": [b"\xff\xfe"],
}  # fmt: skip


CASES = [(name, content) for name, contents in SPOILT.items() for content in contents]


@pytest.mark.parametrize(("name", "content"), CASES, ids=lambda x: str(x)[:40])
def test_a_spoilt_file_is_refused(name, content):
    with pytest.raises(ModelError, match="here"):
        read(GOOD | {name: content})


@pytest.mark.parametrize("value", [7, None, [], {}, {"content": 7}, {"content": None}, True])
def test_a_special_token_that_is_no_text_is_none(value):
    made = read(GOOD | {"tokenizer_config.json": json.dumps({"eos_token": value}).encode()})
    assert made.names == {}
    assert made.eos_ids == (257, 256)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_tokenizer_loads_or_is_refused(seed):
    draw, content = random.Random(seed), bytearray(GOOD["tokenizer.json"])
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(1500) if draw.random() < 0.5 else draw.randrange(len(content) - 1500, len(content))
        kind = draw.randrange(4)
        if kind == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[at : at + draw.randrange(1, 40)]
        elif kind == 2:
            content[at:at] = draw.choice([b"9", b"-1", b"null", b'"', b"{}", b"[]", b"true", b"1e99", b'"type":"x",'])
        else:
            content[at:at] = content[draw.randrange(len(content)) :][:20]
    try:
        made = read(GOOD | {"tokenizer.json": bytes(content)})
    except ModelError:
        return
    made.decode(made.encode("Hello </s> 12"))
