"""A model folder on disk: which tensors lie in which safetensors file, and a writer that streams.

The format: 8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, then the bytes.
The library's own writer wants all tensors at once; this one holds one, so that saving needs no second copy.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rung.core.errors import ModelError
from rung.core.shapes import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
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
ALIGNMENT = 8  # of the first tensor's byte, as the reference writer has it


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
        names = sorted(set(_json(folder / INDEX).get("weight_map", {}).values()))
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{folder} has no weights: needed {SINGLE} or {INDEX}, found {held}. "
            "Rung reads safetensors; save the model again with `save_pretrained(folder)`."
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ModelError(
            f"{folder / INDEX} names {missing or 'no file'}, which the folder lacks. Copy it again in full."
        )
    return tuple(read_header(folder / name) for name in names)


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
    return _json(path)


def read_files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The small files of a folder that exist, by name."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def read_header(path: Path) -> Shard:
    """What one safetensors file holds."""
    with _opened(path) as file:
        names = file.offset_keys()
        slices = [(name, file.get_slice(name)) for name in names]
        entries = tuple(Entry(name, s.get_dtype(), tuple(s.get_shape())) for name, s in slices)
        return Shard(file=path.name, entries=entries, metadata=file.metadata() or {})


def _opened(path: Path):
    import safetensors

    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{path} is truncated or not a safetensors file ({error}). Copy the file again.") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}: needed a Hugging Face model folder.") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: needed a JSON object, found {type(value).__name__}.")
    return value
