"""A model folder on disk: which tensors lie in which safetensors file, and a writer that streams.

The format: 8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, then the bytes.
The library's own writer wants all tensors at once; this one holds one, so that saving needs no second copy.

A folder may come from anybody.  So every file of it is found by `member`, which stays inside the folder; JSON is read
strictly and up to a size; and a header must account for every byte of its file before any tensor is allocated.
"""

import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rung.core.config import strict_json
from rung.core.errors import ModelError
from rung.core.shapes import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # PEFT's two files, where there is no model
COMPANIONS = (  # small files that travel with the weights
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "NOTICE",
)
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
CARRIED: Mapping[str, torch.dtype] = {  # of tensors that are no weights: copied from a folder to the next
    **DTYPES,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}
BYTES: Mapping[str, int] = {  # of one number; what DTYPES lacks is measured all the same, and refused by its name
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
ALIGNMENT = 8  # of the first tensor's byte, as the reference writer has it
MAX_JSON = 32 << 20  # bytes of a header or JSON file: twice the index of a model of 140 000 tensors
MAX_COMPANION = 256 << 20  # bytes of a small file; the largest tokenizer.json that is known has 33 million
MAX_DIMS, MAX_DIM = 8, 1 << 40  # no tensor of a model comes near either
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # pickles: reading one runs whatever code its author put there
CONVERSION = (
    'python -c "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    'a, b = sys.argv[1:]; M.from_pretrained(a).save_pretrained(b); T.from_pretrained(a).save_pretrained(b)" '
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: name, safetensors' code of its dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes, and its metadata."""

    file: str
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})


def write_shard(path: Path, shard: Shard, tensor: Callable[[Entry], Tensor]) -> None:
    """Write one file, asking `tensor` for each entry in turn; dtypes and shapes must be those of the entries."""
    header: dict[str, Any] = {"__metadata__": dict(shard.metadata)} if shard.metadata else {}
    at = 0
    for entry in shard.entries:
        size = CARRIED[entry.dtype].itemsize * torch.Size(entry.shape).numel()
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in shard.entries:
            value = tensor(entry)
            assert (value.dtype, tuple(value.shape)) == (CARRIED[entry.dtype], entry.shape), entry
            file.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_shards(folder: Path) -> tuple[Shard, ...]:
    """What the safetensors files of a folder hold, by their headers alone."""
    if (folder / INDEX).is_file():
        names = _indexed(folder)
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        held = sorted(p.name for p in folder.iterdir())
        pickled = any(name.endswith(PICKLED) for name in held)
        raise ModelError(
            f"{folder} has no weights: needed {SINGLE} or {INDEX}, found {', '.join(held[:8]) or 'nothing'}. "
            + (refusal(str(folder)) if pickled else "Save the model again with `save_pretrained(folder)`.")
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ModelError(
            f"{folder / INDEX} names {missing or 'no file'}, which the folder lacks. Copy it again in full."
        )
    shards = tuple(read_header(member(folder, name)) for name in names)
    held_by: dict[str, str] = {}
    for shard in shards:
        for entry in shard.entries:
            if entry.name in held_by:
                raise ModelError(f"{folder}: {held_by[entry.name]} and {shard.file} both hold tensor {entry.name!r}.")
            held_by[entry.name] = shard.file
    return shards


def refusal(source: str) -> str:
    """Why a pickle is not read, and the command that turns it into what is."""
    target = f"{Path(source).name or 'model'}-safetensors"
    return (
        "Rung reads safetensors and GGUF only, because opening a pickle (.bin, .pt, .pth, .ckpt) runs code that its "
        f"author chose. Where you trust it, convert it once: {CONVERSION}{shlex.quote(source)} {shlex.quote(target)}"
    )


def member(folder: Path, name: str) -> Path:
    """A file of a model folder, links followed; raises ModelError where it lies elsewhere.

    The Hub's own cache is the one exception: its `snapshots/COMMIT/` hold links to `blobs/` beside `snapshots`.
    """
    home, path = folder.resolve(), (folder / name).resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.is_relative_to(allowed) for allowed in homes):
        raise ModelError(
            f"{folder / name} leads out of the folder, to {path}. A model's files lie in its folder: copy it there, if "
            "you know what it is."
        )
    return folder / name


def tensors(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of one file, one at a time."""
    import safetensors

    with _opened(path) as file:
        for name in names:
            try:
                value = file.get_tensor(name)
            except safetensors.SafetensorError as error:
                raise ModelError(f"{path}: tensor {name!r} cannot be read ({error}). Copy the file again.") from error
            yield name, value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder."""
    try:
        held = member(path.parent, path.name)
        if (size := held.stat().st_size) > MAX_JSON:
            raise ModelError(f"{path} has {size} bytes; at most {MAX_JSON} are read.")
        return json_object(held.read_bytes(), str(path))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}: needed a Hugging Face model folder.") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}).") from error


def json_object(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object of UTF-8 text, read strictly; else ModelError."""
    try:
        value = strict_json(content)
    except ValueError as error:
        raise ModelError(f"{where} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ModelError(f"{where}: needed a JSON object, found {type(value).__name__}.")
    return value


def read_files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The small files of a folder that exist, by name."""
    found = {}
    for name in names:
        if (folder / name).is_file():
            if (size := member(folder, name).stat().st_size) > MAX_COMPANION:
                raise ModelError(f"{folder / name} has {size} bytes; at most {MAX_COMPANION} are read.")
            found[name] = (folder / name).read_bytes()
    return found


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_header(path: Path) -> Shard:
    """What a safetensors file holds.  Its header must account for every byte of the file.

    Checked before anything of the size that it claims is allocated: the header's length, that every dtype, shape and
    pair of offsets agree, and that the tensors lie one behind the other from the first byte to the last.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > MAX_JSON:
            raise _broken(
                path,
                f"it begins a header of {length} bytes; it has {size} bytes in all, and a header at most {MAX_JSON}",
            )
        raw = json_object(file.read(length), f"{path} is truncated or not a safetensors file: its header")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its metadata are not names and strings")
    places = sorted(_place(path, name, described) for name, described in raw.items())
    at = 0
    for start, end, name, *_ in places:
        if start != at:
            raise _broken(path, f"tensor {name!r} begins at byte {start}, where {at} was needed")
        at = end
    if at != size - 8 - length:
        raise _broken(path, f"its tensors need {at} bytes, and {size - 8 - length} are there")
    return Shard(file=path.name, entries=tuple(Entry(*rest) for *_, rest in places), metadata=metadata)


def _place(path: Path, name: str, described: Any) -> tuple[int, int, str, tuple[str, str, tuple[int, ...]]]:
    """First and last byte of a tensor, its name again for sorting, and what an Entry says."""
    try:
        name.encode("utf-8")
        dtype, shape, (start, end) = described["dtype"], described["shape"], described["data_offsets"]
        sound = len(described) == 3 and all(type(n) is int for n in (*shape, start, end)) and dtype in BYTES
        sound = sound and len(shape) <= MAX_DIMS and all(0 <= n < MAX_DIM for n in shape) and 0 <= start <= end
        sound = sound and end - start == BYTES[dtype] * math.prod(shape)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise _broken(path, f"dtype, shape and offsets of tensor {name!r} do not agree: {str(described)[:200]}")
    return start, end, name, (name, dtype, tuple(shape))


def _indexed(folder: Path) -> list[str]:
    """The files that an index names: plain names, so that reading or writing them never leaves the folder."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{folder / INDEX}: needed a weight_map of tensor names to file names.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors") or not name.isprintable():
            raise ModelError(
                f"{folder / INDEX} names {name!r}: needed plain names of .safetensors files in the same folder."
                + (f" {refusal(str(folder))}" if name.endswith(PICKLED) else "")
            )
    return names


def _opened(path: Path):
    import safetensors

    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise _broken(path, str(error)) from error


def _broken(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is truncated or not a safetensors file ({why}). Copy the file again.")
