"""Atomic checkpoints: a folder written aside, brought to the disk, hashed, renamed.  No pickle.

    checkpoints/step-00000120/
      NAME.safetensors   tensors, as many files as the caller names
      values.json        counters and other plain values
      manifest.json      step, score, and the size and SHA-256 of every file; written last, with a hash of itself

A killed writer leaves a `.tmp-` folder, which nobody reads and the next writer removes.  Tensors are written one after
another straight from their memory (in the safetensors format), and hashed on the way.  The newest `keep` checkpoints
and the one with the best score stay.  A step saved again gets a suffix, so that no moment is without a checkpoint.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rung.core.errors import RunError
from rung.core.rundir import fsync_folder
from rung.core.shapes import Tensor

MANIFEST, VALUES, SUFFIX = "manifest.json", "values.json", ".safetensors"
NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")  # step, and the number of earlier savings of the same step
CHUNK = 1 << 24  # bytes written and hashed at a time: 16 MiB
DTYPES = {  # names of the safetensors format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose hashes were right when it was opened.

    values:   what was handed to `save`
    warnings: sentences about newer checkpoints that could not be used
    """

    folder: Path
    step: int
    score: float | None
    values: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, read from the disk as they are touched."""
        with safe_open(self.folder / f"{name}{SUFFIX}", framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is not a mapping)


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    values: Mapping[str, Any],
    *,
    keep: int = 2,
    score: float | None = None,
) -> Path:
    """Write a checkpoint of `step`, then remove those that are no longer kept.  Returns its folder.

    tensors: file name -> tensor name -> tensor, of any device and layout; values: JSON.
    Later checkpoints than `step` belong to a future that this run has left (they were corrupt when it was resumed from
    an earlier one), and are removed too.  Raises RunError where the disk is full; the old checkpoints stay.
    """
    score = score if score is not None and math.isfinite(score) else None
    needed = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())
    aside = folder / f".tmp-{step:08d}"
    try:
        for stale in folder.glob(".tmp-*"):
            shutil.rmtree(stale)
        aside.mkdir(parents=True)
        files = {f"{name}{SUFFIX}": _write_tensors(aside / f"{name}{SUFFIX}", named) for name, named in tensors.items()}
        files[VALUES] = _write(aside / VALUES, [json.dumps(values, allow_nan=False).encode()])
        body = {"schema": 1, "step": step, "score": score, "files": files}
        _write(aside / MANIFEST, [json.dumps(body | {"self": _hash_of(body)}, indent=1).encode()])
        fsync_folder(aside)
        target = folder / _free_name(folder, step)
        os.rename(aside, target)
        fsync_folder(folder)
    except OSError as error:
        raise RunError(
            f"the checkpoint of step {step} needs {needed / 1e6:.1f} MB in {folder} and could not be written "
            f"({error.strerror}): make room and resume; the earlier checkpoints are intact"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _prune(folder, target, keep)
    return target


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose hashes are right, None where none was ever written.

    Raises RunError where there are checkpoints and none can be used.
    """
    warnings: list[str] = []
    for path in _newest_first(folder):
        if problem := verify(path):
            warnings.append(f"checkpoint {path.name} cannot be used ({problem}); falling back to the one before it")
        else:
            manifest = _manifest(path)
            values = json.loads((path / VALUES).read_bytes())
            return Checkpoint(
                folder=path, step=manifest["step"], score=manifest["score"], values=values, warnings=tuple(warnings)
            )
    if warnings:
        raise RunError(f"no checkpoint in {folder} can be used: " + "; ".join(warnings))
    return None


def verify(path: Path) -> str:
    """What is wrong with a checkpoint, "" where every file has its size and hash."""
    try:
        manifest = _manifest(path)
        for name, expected in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            with open(path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} does not have the hash it was written with"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except ValueError as error:
        return f"{MANIFEST}: {error}"
    return ""


def _manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / MANIFEST).read_bytes())
    if not isinstance(manifest, dict) or manifest.pop("self", None) != _hash_of(manifest):
        raise ValueError("it does not have the hash it was written with")
    return manifest


def _hash_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _newest_first(folder: Path) -> list[Path]:
    found = [(match, path) for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(((int(m[1]), int(m[2] or 0)), path) for m, path in found)][::-1]


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def _free_name(folder: Path, step: int) -> str:
    again = [int(m[2] or 0) for path in _newest_first(folder) if (m := NAME.fullmatch(path.name)) and int(m[1]) == step]
    return f"step-{step:08d}.{max(again) + 1}" if again else f"step-{step:08d}"


def _prune(folder: Path, newest: Path, keep: int) -> None:
    step = _step(newest)
    others = [path for path in _newest_first(folder) if _step(path) < step]
    scores = {path: score for path in [newest, *others] if (score := _score(path)) is not None}
    kept = {newest, *others[: keep - 1]}
    if scores:
        kept.add(max(scores, key=lambda path: scores[path]))  # of equals the first: the newest
    for path in _newest_first(folder):
        if path not in kept:
            shutil.rmtree(path)


def _score(path: Path) -> float | None:
    try:
        return _manifest(path)["score"]
    except (OSError, ValueError):
        return None


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return _write(path, itertools.chain([len(text).to_bytes(8, "little"), text], map(_bytes, tensors.values())))


def _bytes(tensor: Tensor) -> memoryview:
    flat_N = tensor.detach().cpu().contiguous().reshape(-1)
    return flat_N.view(torch.uint8).numpy().data


def _write(path: Path, parts: Any) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), CHUNK):
                piece = view[start : start + CHUNK]
                digest.update(piece)
                while piece:
                    piece = piece[file.write(piece) :]
            size += len(view)
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}
