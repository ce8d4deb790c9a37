"""A GGUF file as values: metadata and where its tensors lie.  Little-endian, versions 2 and 3.  [gguf specification]

    "GGUF"  version u32  #tensors u64  #metadata u64
    #metadata times:  name  type u32  value           a string is u64 bytes of UTF-8; an array is type u32, count u64
    #tensors times:   name  #dims u32  dims u64 ...  type u32  offset u64      dims from the fastest to the slowest
    padding to `general.alignment`; then the tensors, one behind the other, each padded to it

The file may come from anybody: every count is held against the bytes that are left before anything is made of it, and
the tensors must account for the file.  Numbers become NumPy arrays that own their memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rung.core.errors import ModelError
from rung.lm.weights.quants import QUANTS, dequantise

MAGIC, VERSIONS = b"GGUF", (2, 3)
BIG_ENDIAN = 1 << 24  # from here on a version is a small number read the wrong way round
MAX_HEADER = 256 << 20  # bytes before the tensors: ten times the largest vocabulary that is known
MAX_FACTS, MAX_TENSORS, MAX_STRINGS = 1 << 12, 1 << 16, 1 << 21  # known: 60, 2000, 515 000 (merges)
MAX_DIMS, MAX_NAME, MAX_ALIGNMENT = 4, 1 << 10, 1 << 16
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS: Mapping[int, str] = {  # type -> NumPy's name
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
CHUNK = 1 << 24  # numbers that are dequantised at a time


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor: its name, shape (slowest dimension first), quantisation and first byte in the file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int


@dataclass(frozen=True, kw_only=True, eq=False)
class GGUFFile:
    """facts: the metadata, by name; tensors, by name."""

    path: Path
    facts: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def values(self, name: str) -> np.ndarray:
        """The numbers of a tensor: as they are stored where they are not quantised (bf16 as uint16), else in fp32."""
        tensor = self.tensors[name]
        quant = QUANTS[tensor.kind]
        count = math.prod(tensor.shape)
        if quant.block == 1:
            with self.path.open("rb") as file:
                file.seek(tensor.start)
                found = np.fromfile(file, quant.dtype, count)
            if found.size < count:
                raise _broken(self.path, f"tensor {name!r} ends early")
            return found.reshape(tensor.shape)
        found, step = np.empty(count, np.float32), CHUNK // quant.block * quant.block
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            for at in range(0, count, step):
                here = min(step, count - at)
                raw = np.fromfile(file, np.uint8, quant.bytes_of(here))
                if raw.size < quant.bytes_of(here):
                    raise _broken(self.path, f"tensor {name!r} ends early")
                found[at : at + here] = dequantise(tensor.kind, raw)
        return found.reshape(tensor.shape)


def read_gguf(path: Path) -> GGUFFile:
    """Metadata and tensor table of a file.  Raises ModelError for anything that is not whole and sound."""
    try:
        with path.open("rb") as file:
            return _read(path, _Cursor(file, path))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file.") from None


class _Cursor:
    """Reads forwards; refuses to pass the end of the file, or of what a header may be."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size = file, path, path.stat().st_size
        self.at, self.end = 0, min(self.size, MAX_HEADER)

    def take(self, count: int, what: str) -> bytes:
        if count > self.end - self.at:
            raise _broken(self.path, f"{what} at byte {self.at} needs {count} bytes, and {self.end - self.at} are left")
        self.at += count
        return self.file.read(count)

    def whole(self, size: int, what: str) -> int:
        """An unsigned number of so many bytes."""
        return int.from_bytes(self.take(size, what), "little")

    def count(self, what: str, *, bytes_each: int, most: int = MAX_HEADER) -> int:
        """A u64 that counts things of at least so many bytes."""
        found = self.whole(8, f"the number of {what}")
        if found > most or found * bytes_each > self.end - self.at:
            raise _broken(
                self.path, f"{found} {what} are more than {most}, or than {self.end - self.at} bytes can hold"
            )
        return found

    def text(self, what: str, most: int = MAX_HEADER) -> str:
        length = self.count(f"bytes of {what}", bytes_each=1, most=most)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _broken(self.path, f"{what} is not UTF-8 ({error})") from error

    def value(self, name: str) -> Any:
        kind = self.whole(4, f"the type of {name!r}")
        if kind == STRING:
            return self.text(repr(name))
        if kind != ARRAY:
            dtype = np.dtype(self._numeric(kind, name))
            found = np.frombuffer(self.take(dtype.itemsize, repr(name)), dtype)[0].item()
            return bool(found) if kind == BOOL else found
        kind = self.whole(4, f"the type of {name!r}")
        if kind == STRING:
            count = self.count(f"strings of {name!r}", bytes_each=8, most=MAX_STRINGS)
            return [self.text(repr(name)) for _ in range(count)]
        dtype = np.dtype(self._numeric(kind, name))
        count = self.count(f"numbers of {name!r}", bytes_each=dtype.itemsize)
        return np.frombuffer(self.take(count * dtype.itemsize, repr(name)), dtype).copy()

    def _numeric(self, kind: int, name: str) -> str:
        if kind not in NUMBERS:
            what = "an array of arrays" if kind == ARRAY else f"of type {kind}"
            raise _broken(self.path, f"the value of {name!r} is {what}, which no known file has")
        return NUMBERS[kind]


def _read(path: Path, cursor: _Cursor) -> GGUFFile:
    if cursor.size < len(MAGIC) or cursor.take(len(MAGIC), "the magic number") != MAGIC:
        raise _broken(path, "it does not begin with the letters GGUF")
    version = cursor.whole(4, "the version")
    if version not in VERSIONS:
        kind = "big-endian" if version >= BIG_ENDIAN else f"of version {version}"
        raise ModelError(f"{path} is not a readable GGUF file: it is {kind}; needed little-endian, version 2 or 3.")
    num_tensors = cursor.count("tensors", bytes_each=32, most=MAX_TENSORS)
    num_facts = cursor.count("metadata", bytes_each=13, most=MAX_FACTS)
    facts: dict[str, Any] = {}
    for _ in range(num_facts):
        name = cursor.text("a name in the metadata", MAX_NAME)
        if name in facts:
            raise _broken(path, f"the metadata name {name!r} twice")
        facts[name] = cursor.value(name)
    described = [_described(path, cursor) for _ in range(num_tensors)]
    tensors = {tensor.name: tensor for tensor in described}
    if len(tensors) < len(described):
        raise _broken(path, "two tensors have the same name")
    alignment = facts.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _broken(path, f"its alignment is {alignment!r}")
    return GGUFFile(path=path, facts=facts, tensors=_placed(path, cursor, tensors, alignment))


def _described(path: Path, cursor: _Cursor) -> Stored:
    """One row of the tensor table; `start` still counts from the first tensor's byte."""
    name = cursor.text("a tensor's name", MAX_NAME)
    num_dims = cursor.whole(4, f"the dimensions of {name!r}")
    if not 0 < num_dims <= MAX_DIMS:
        raise _broken(path, f"tensor {name!r} has {num_dims} dimensions")
    shape = tuple(cursor.whole(8, f"the shape of {name!r}") for _ in range(num_dims))[::-1]
    code = cursor.whole(4, f"the type of {name!r}")
    start = cursor.whole(8, f"the offset of {name!r}")
    kind = next((kind for kind, quant in QUANTS.items() if quant.code == code), None)
    if kind is None:
        raise ModelError(
            f"{path}: tensor {name!r} is of GGUF type number {code}; Rung reads {', '.join(QUANTS)}. Take a file in "
            "one of these (Q8_0, Q4_K_M), or the model's Hugging Face folder."
        )
    if not math.prod(shape) or shape[-1] % QUANTS[kind].block:
        raise _broken(path, f"tensor {name!r} of shape {list(shape)} cannot be of type {kind}")
    return Stored(name=name, shape=shape, kind=kind, start=start)


def _placed(path: Path, cursor: _Cursor, tensors: Mapping[str, Stored], alignment: int) -> dict[str, Stored]:
    """The tensors with their place in the file, which they must fill one behind the other."""
    begin, at = -(-cursor.at // alignment) * alignment, 0
    placed = {}
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        needed = QUANTS[tensor.kind].bytes_of(math.prod(tensor.shape))
        if tensor.start != at:
            raise _broken(path, f"tensor {tensor.name!r} begins at byte {tensor.start}, where {at} was needed")
        if begin + at + needed > cursor.size:
            left = max(cursor.size - begin - at, 0)
            raise _broken(path, f"tensor {tensor.name!r} needs {needed} bytes, and {left} are left")
        placed[tensor.name] = Stored(name=tensor.name, shape=tensor.shape, kind=tensor.kind, start=begin + at)
        at = -(-(at + needed) // alignment) * alignment
    return placed


def _broken(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is not a readable GGUF file: {why}. Fetch it again.")
