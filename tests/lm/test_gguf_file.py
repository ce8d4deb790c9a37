"""GGUF files that were made to harm: each is refused before anything of the size that it claims is made."""

import random
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import gguf_twin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rung.core.errors import ModelError
from rung.lm.weights.gguf import convert
from rung.lm.weights.gguf_file import read_gguf

HUGE = 2**64 - 1
FEW_BYTES, FEW_SECONDS = 8 << 20, 2.0  # a refusal costs no more, whatever the file claims


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return u64(len(raw)) + raw


def fact(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + u32(kind) + value


def table(name: str, shape: tuple[int, ...], kind: int = 0, start: int = 0, num_dims: int | None = None) -> bytes:
    dims = b"".join(u64(n) for n in reversed(shape))
    return text(name) + u32(len(shape) if num_dims is None else num_dims) + dims + u32(kind) + u64(start)


VERSION = u32(3)


def file(*parts: bytes, magic=b"GGUF", version=VERSION, tensors=0, facts=0, data=b"") -> bytes:
    """A file from its header's parts; padded to 32 bytes, then the tensors' data."""
    head = magic + version + u64(tensors) + u64(facts) + b"".join(parts)
    return head + bytes(-len(head) % 32) + data


SOUND = file(fact("a", 4, u32(7)), table("t", (2, 3)), tensors=1, facts=1, data=np.arange(6, dtype="<f4").tobytes())


def read(tmp_path: Path, content: bytes):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def test_a_sound_file_is_read(tmp_path):
    found = read(tmp_path, SOUND)
    assert found.facts == {"a": 7}
    assert found.values("t").tolist() == [[0, 1, 2], [3, 4, 5]]


KINDS = [
    (0, "<B", 200), (1, "<b", -3), (2, "<H", 60_000), (3, "<h", -3), (4, "<I", 2**31), (5, "<i", -3), (6, "<f", 0.5),
    (7, "<?", True), (10, "<Q", 2**63), (11, "<q", -3), (12, "<d", 0.1),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "form", "value"), KINDS)
def test_every_type_of_number_is_read_alone_and_in_an_array(tmp_path, kind, form, value):
    raw = struct.pack(form, value)
    alone = fact("alone", kind, raw)
    array = fact("array", 9, u32(kind) + u64(3) + raw * 3)
    found = read(tmp_path, file(alone, array, facts=2)).facts
    assert found["alone"] == value
    assert found["array"].tolist() == [value] * 3


HOSTILE = {
    "empty": b"",
    "magic": file(magic=b"GGML"),
    "version 1": file(version=u32(1)),
    "version 9": file(version=u32(9)),
    "big-endian": file(version=struct.pack(">I", 3)),
    "a billion tensors": file(tensors=10**9),
    "all tensors there are": file(tensors=HUGE),
    "all metadata there are": file(facts=HUGE),
    "a name of 2^63 bytes": file(u64(2**63), facts=1),
    "a name of a megabyte": file(fact("n" * (1 << 20), 4, u32(1)), facts=1),
    "a name that is not UTF-8": file(fact(b"\xff\xfe", 4, u32(1)), facts=1),
    "a name twice": file(fact("a", 4, u32(1)) * 2, facts=2),
    "a text of 2^60 bytes": file(fact("a", 8, u64(2**60)), facts=1),
    "a text that is not UTF-8": file(fact("a", 8, text(b"\xc3\x28")), facts=1),
    "an unknown type": file(fact("a", 77, u64(1)), facts=1),
    "an array of a billion strings": file(fact("a", 9, u32(8) + u64(10**9)), facts=1),
    "an array of a billion numbers": file(fact("a", 9, u32(4) + u64(10**9)), facts=1),
    "an array of 2^64 - 1 bytes": file(fact("a", 9, u32(0) + u64(HUGE)), facts=1),
    "an array of arrays": file(fact("a", 9, u32(9) + u64(2) + (u32(9) + u64(1)) * 2), facts=1),
    "an array of unknown things": file(fact("a", 9, u32(13) + u64(1)), facts=1),
    "no dimensions": file(table("t", ()), tensors=1),
    "2^32 - 1 dimensions": file(table("t", (1,), num_dims=2**32 - 1), tensors=1),
    "a dimension of nothing": file(table("t", (0, 4)), tensors=1),
    "dimensions whose product overflows": file(table("t", (2**32, 2**32, 2**32)), tensors=1),
    "a dimension of 2^64 - 1": file(table("t", (HUGE,)), tensors=1),
    "a negative offset": file(table("t", (2, 3), start=HUGE - 63), tensors=1, data=bytes(64)),
    "an offset behind the file": file(table("t", (2, 3), start=1 << 40), tensors=1, data=bytes(64)),
    "an offset that is not aligned": file(table("t", (2, 3), start=4), tensors=1, data=bytes(64)),
    "a gap": file(table("t", (2, 3), start=64), tensors=1, data=bytes(128)),
    "tensors that overlap": file(table("t", (2, 3)), table("u", (2, 3)), tensors=2, data=bytes(64)),
    "a tensor twice": file(table("t", (2, 3)), table("t", (2, 3), start=32), tensors=2, data=bytes(64)),
    "a tensor that ends behind the file": file(table("t", (2, 3)), tensors=1, data=bytes(23)),
    "a type that is not known": file(table("t", (2, 32), kind=40), tensors=1, data=bytes(64)),
    "a row that is not whole blocks": file(table("t", (2, 31), kind=8), tensors=1, data=bytes(96)),
    "an alignment of 0": file(fact("general.alignment", 4, u32(0)), facts=1),
    "an alignment of 3": file(fact("general.alignment", 4, u32(3)), facts=1),
    "an alignment of 2^31": file(fact("general.alignment", 4, u32(2**31)), facts=1),
    "an alignment of words": file(fact("general.alignment", 8, text("32")), facts=1),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_at_little_cost(tmp_path, case):
    with bounded(), pytest.raises(ModelError, match=r"x\.gguf(: tensor 't' is of GGUF type| is not a readable GGUF)"):
        read(tmp_path, HOSTILE[case])


@pytest.mark.parametrize("keep", range(0, len(SOUND), 3))
def test_a_file_cut_short_anywhere_is_refused(tmp_path, keep):
    with pytest.raises(ModelError, match="is not a readable GGUF file"):
        read(tmp_path, SOUND[:keep])


def test_more_empty_strings_than_any_vocabulary_has_are_not_made(tmp_path):
    (tmp_path / "x.gguf").write_bytes(file(fact("a", 9, u32(8) + u64(1 << 22) + bytes(8 << 22)), facts=1))
    with bounded(), pytest.raises(ModelError, match=r"4194304 strings of 'a' are more than 2097152"):
        read_gguf(tmp_path / "x.gguf")


class bounded:
    """Fails where the work inside took more memory or time than a refusal may."""

    def __enter__(self) -> None:
        tracemalloc.start()
        self.begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds, (_, peak) = time.perf_counter() - self.begin, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < FEW_BYTES
        assert seconds < FEW_SECONDS


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A file that converts, of a model of a few numbers."""
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, number in {
        "block_count": 1, "context_length": 8, "embedding_length": 32, "feed_forward_length": 32,
        "attention.head_count": 2, "attention.head_count_kv": 1, "vocab_size": len(gguf_twin.WORDS),
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{name}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    gguf_twin.add_vocabulary(writer, gguf_twin.VOCABULARY | {"chat_template": "{{ messages }}", "bos_token_id": 0})
    shapes = {"token_embd": (len(gguf_twin.WORDS), 32), "output_norm": (32,), "blk.0.attn_norm": (32,)}
    shapes |= {"blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    for name, shape in shapes.items():
        kind = "F32" if len(shape) == 1 else "Q8_0"
        raw = gguf_twin.packed(kind, np.ones(shape, np.float32), np.random.default_rng(0))
        writer.add_tensor(name + ".weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    gguf_twin.close(writer)
    return path.read_bytes()


SPANS = [1, 2, 4, 8]
NUMBERS = [0, 1, 2, 31, 33, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63, HUGE]


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), num_changes=st.integers(1, 6), header_only=st.booleans())
def test_a_mutated_file_converts_or_is_refused(whole, tmp_path_factory, seed, num_changes, header_only):
    """Bytes overwritten by numbers that are at the edges, removed, inserted and repeated, anywhere in the header."""
    draw, content = random.Random(seed), bytearray(whole)
    for _ in range(num_changes):
        at, span = draw.randrange(2200 if header_only else len(content)), draw.choice(SPANS)
        kind = draw.randrange(5)
        if kind < 2:
            content[at : at + span] = (draw.choice(NUMBERS) % 256**span).to_bytes(span, "little")
        elif kind == 2:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 3:
            del content[at : at + span]
        else:
            content[at:at] = content[draw.randrange(len(content)) :][:span]
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "x.gguf").write_bytes(content)
    begin = time.perf_counter()
    try:
        convert(folder / "x.gguf", folder)
    except ModelError:
        pass
    else:
        assert (folder / "model.safetensors").stat().st_size < 1 << 20
    assert time.perf_counter() - begin < 20


def test_the_file_that_is_mutated_converts(whole, tmp_path):
    (tmp_path / "x.gguf").write_bytes(whole)
    convert(tmp_path / "x.gguf", tmp_path)
    assert len(whole) > 2200 > whole.index(b"{{ messages }}")
