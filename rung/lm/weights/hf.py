"""Hugging Face model folders: in and out, tensor by tensor, byte for byte.

Loading is strict: every tensor of the folder has a place, every parameter is filled, shapes agree.  Saving writes back
what was read: the same files, names, order and dtypes; config.json keeps the fields that mean nothing to us.
"""

import difflib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rung.core.errors import ModelError
from rung.core.progress import Listener, Progress, silent
from rung.core.rundir import fsync_folder
from rung.core.shapes import Tensor
from rung.lm.config import DecoderConfig
from rung.lm.decoder import Decoder
from rung.lm.weights.families import from_hugging_face, to_hugging_face
from rung.lm.weights.files import (
    CARRIED,
    CODES,
    COMPANIONS,
    DTYPES,
    INDEX,
    SINGLE,
    Entry,
    Shard,
    read_files,
    read_json,
    read_shards,
    tensors,
    write_shard,
)
from rung.lm.weights.names import Rule, hugging_face_names, rules, split

Export = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]  # our parameters by name -> tensors of files by name
Change = Callable[[str, Tensor], Tensor]  # their name of a tensor, and its value -> the value to take in its place
DERIVED = ".rotary_emb.inv_freq"  # a table that old Llama files carry; it follows from the config, and is not kept


def unchanged(name: str, value: Tensor) -> Tensor:
    """The `Change` that is none."""
    return value


@dataclass(frozen=True, kw_only=True, eq=False)
class Folder:
    """Everything of a model folder but the values of its weights: enough to write it again.

    config: config.json as it was read; shards: names, dtypes and order of the tensors; index: the rest of
    model.safetensors.index.json; files: the small files, by name; path: where it was read.
    """

    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    index: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    path: Path | None = None


def load_folder(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    listener: Listener = silent,
    change: Change = unchanged,
) -> tuple[Decoder, Folder]:
    """A decoder in `dtype` (None: the dtype of the folder's embedding) and what is needed to save it again.

    change: applied to every tensor as the file has it, before it is rounded to `dtype`.
    Raises ModelError for a folder without weights, a missing, unused, truncated or wrong-shaped tensor, or a model
    that Rung has no family for.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder: needed a Hugging Face model folder.")
    raw = read_json(path / "config.json")
    config = from_hugging_face(raw, where=str(path / "config.json"))
    shards = read_shards(path)
    table = rules(config, hugging_face_names(raw))
    _check(table, shards, path, tied=config.tied)
    first = next(entry for shard in shards for entry in shard.entries if entry.name == table[0].parts[0].name)
    decoder = Decoder(config, dtype=dtype or DTYPES[first.dtype], device=torch.device(device))
    _fill(decoder, table, shards, path, listener, change)
    index = read_json(path / INDEX) if (path / INDEX).is_file() else {}
    kept = {key: value for key, value in index.items() if key != "weight_map"}
    return decoder, Folder(config=raw, shards=shards, index=kept, files=read_files(path, COMPANIONS), path=path)


def new_folder(config: DecoderConfig, dtype: torch.dtype) -> Folder:
    """The folder of a decoder that was made here and not loaded."""
    raw = to_hugging_face(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    table = rules(config, hugging_face_names(raw))
    entries = tuple(Entry(part.name, CODES[dtype], part.shape) for rule in table for part in rule.parts)
    return Folder(config=raw, shards=(Shard(file=SINGLE, entries=entries),))


def their_tensors(config: DecoderConfig, raw: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder by name, from our parameters by name: an `Export`, once both configs are given."""
    found: dict[str, Tensor] = {}
    for rule in rules(config, hugging_face_names(raw)):
        found |= split(rule, weights[rule.ours].detach())
    if config.tied:  # some folders write the head all the same
        found["lm_head.weight"] = weights["embedding.weight"].detach()
    return found


def save_folder(path: Path, folder: Folder, theirs: Mapping[str, Tensor], change: Change = unchanged) -> None:
    """Write a model folder: `theirs` are its tensors by name, in any float dtype (fp32 masters, say).

    Each tensor is written in the dtype it had when the folder was read; one that has not changed since then is copied
    from there, so that weights held in fewer bits lose none.  `change` is applied to every tensor before it is written.
    Raises ModelError where the folder cannot be written.
    """
    with written_whole(path) as aside:
        _write(aside, folder, theirs, change)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A folder to write into, which appears as `path` whole and on the disk, or not at all.  Raises ModelError."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ModelError(
            f"{path} exists and is not an empty folder: a model is never written over another. Choose a new name."
        )
    aside = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for file in aside.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        fsync_folder(aside)
        if path.is_dir():
            path.rmdir()
        aside.rename(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise ModelError(
            f"the model folder {path} could not be written ({error.strerror}): make room there, then save it again "
            "(a run is resumed)."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(aside: Path, folder: Folder, theirs: Mapping[str, Tensor], change: Change) -> None:
    """Every file of a model folder."""

    def tensor(entry: Entry) -> Tensor:
        held, dtype = theirs[entry.name], CARRIED[entry.dtype]
        file = None if folder.path is None else folder.path / file_of[entry.name]
        if held.dtype != dtype and file is not None and file.is_file():
            ((_, read),) = tensors(file, [entry.name])
            if read.shape == held.shape and torch.equal(read.to(held.dtype), held.cpu()):
                held = read.to(held.device)
        return change(entry.name, held).to(dtype)

    file_of = {entry.name: shard.file for shard in folder.shards for entry in shard.entries}
    for shard in folder.shards:
        write_shard(aside / shard.file, shard, tensor)
    if folder.index:
        weight_map = {entry.name: shard.file for shard in folder.shards for entry in shard.entries}
        _write_json(aside / INDEX, dict(folder.index) | {"weight_map": dict(sorted(weight_map.items()))})
    _write_json(aside / "config.json", folder.config)
    for name, content in folder.files.items():
        (aside / name).write_bytes(content)


def _fill(
    decoder: Decoder,
    table: tuple[Rule, ...],
    shards: tuple[Shard, ...],
    path: Path,
    listener: Listener,
    change: Change,
) -> None:
    """Copy every tensor into its rows of our parameters, one at a time."""
    parameters = dict(decoder.named_parameters())
    place: dict[str, Tensor] = {}
    for rule in table:
        pieces = torch.split(parameters[rule.ours].data, [part.shape[0] for part in rule.parts])
        place |= {part.name: piece for part, piece in zip(rule.parts, pieces, strict=True)}
    done = 0
    for shard in shards:
        for name, value in tensors(path / shard.file, [e.name for e in shard.entries if e.name in place]):
            place[name].copy_(change(name, value))
            done += 1
            listener(Progress(stage="load", done=done, total=len(place)))
    extra = [shard.file for shard in shards for entry in shard.entries if entry.name == "lm_head.weight" not in place]
    for file in extra:  # tied by the config and yet written: the two must agree
        for name, value in tensors(path / file, ["lm_head.weight"]):
            if not torch.equal(change(name, value).to(decoder.head_weight().dtype), decoder.head_weight().data.cpu()):
                raise ModelError(
                    f"{path}: config.json ties the head to the embedding, but lm_head.weight differs from "
                    'model.embed_tokens.weight. Set "tie_word_embeddings": false if the head is the file\'s own.'
                )


def _check(table: tuple[Rule, ...], shards: tuple[Shard, ...], path: Path, *, tied: bool) -> None:
    """Refuse a folder whose tensors are not exactly those of the config."""
    needed = {part.name: part.shape for rule in table for part in rule.parts}
    found = {entry.name: entry for shard in shards for entry in shard.entries}
    unused = {name for name in found if name not in needed and not name.endswith(DERIVED)}
    if tied:
        unused.discard("lm_head.weight")
    for name, shape in needed.items():
        if name not in found:
            near = difflib.get_close_matches(name, unused, n=1, cutoff=0.5)
            also = f"the nearest unused tensor is {near[0]!r}" if near else "no unused tensor has a similar name"
            raise ModelError(f"{path}: needed tensor {name!r} of shape {list(shape)}, which no file has; {also}.")
        entry = found[name]
        if entry.shape != shape:
            raise ModelError(
                f"{path}: tensor {name!r} needed shape {list(shape)} by config.json, found {list(entry.shape)}."
            )
        if entry.dtype not in DTYPES:
            raise ModelError(f"{path}: tensor {name!r} is of dtype {entry.dtype}; Rung reads {', '.join(DTYPES)}.")
    for name in sorted(unused):
        near = difflib.get_close_matches(name, needed, n=1, cutoff=0.5)
        also = f"; the nearest known name is {near[0]!r}" if near else ""
        raise ModelError(f"{path}: tensor {name!r} has no place in the model that config.json describes{also}.")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
