"""A model: a decoder, and the tokenizer that belongs to it.  `load` makes one, `save` writes it for other tools."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from rung.core.device import idle_gpu, open_device
from rung.core.errors import ConfigError, ModelError, nearest
from rung.core.progress import Listener, Progress, silent
from rung.core.records import Layout
from rung.core.shapes import Float, Int, Tensor
from rung.core.words import Message
from rung.lm.adapters.lora import Site, linear_sites, native_sites
from rung.lm.adapters.peft import is_adapter, load_adapter
from rung.lm.decoder import Decoder
from rung.lm.foreign import foreign_outline, load_foreign
from rung.lm.protocols import ModelDecoder
from rung.lm.weights.families import FAMILIES, from_hugging_face
from rung.lm.weights.files import COMPANIONS, read_files, read_json, read_shards
from rung.lm.weights.hf import Change, Export, Folder, load_folder, new_folder, save_folder, their_tensors, unchanged
from rung.lm.weights.names import hugging_face_names
from rung.lm.weights.sources import locate
from rung.lm.wrapper import ForeignDecoder
from rung.text.chat import prompt_ids
from rung.text.pretrained import Tokenizer

DType = Literal["auto", "bf16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """decoder: the weights in their compute dtype; folder: what else its folder held; name: where it came from;
    export: from the decoder's parameters to the tensors of the folder's files; sites: layers that can have adapters."""

    decoder: ModelDecoder
    folder: Folder
    name: str
    export: Export
    sites: tuple[Site, ...]
    text: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ModelError on use when the folder had no tokenizer files."""
        if self.text is None:
            raise ModelError(
                f"{self.name} has no tokenizer.json, so text cannot become tokens. Copy tokenizer.json and "
                "tokenizer_config.json into the folder, or give token ids to rung.engine."
            )
        return self.text

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """A conversation through the chat template, with the opening of the answer that is wanted.

        A conversation that ends with the assistant's own words leaves that answer open, for the model to go on.
        """
        if messages and messages[-1].role == "assistant":
            return prompt_ids(self.tokenizer, messages[:-1]) + tuple(self.tokenizer.encode(messages[-1].content))
        return prompt_ids(self.tokenizer, messages)

    @torch.inference_mode()
    def logits(self, token_ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of every next token, fp32; rows are sequences of equal length that start at position 0."""
        rows, length = token_ids_BT.shape
        place = next(self.decoder.parameters()).device
        hidden_ND = self.decoder.forward(token_ids_BT.reshape(-1).to(place), Layout.chains([length] * rows))
        return self.decoder.head(hidden_ND).float().unflatten(0, (rows, length))

    def save(self, folder: str | Path, weights: Mapping[str, Tensor] | None = None, change: Change = unchanged) -> Path:
        """Write a Hugging Face folder that must not exist yet (or be empty), in the dtypes of the folder it came from.

        `weights`: our parameters by name to write in place of the decoder's own (the learner's fp32 masters).
        `change`: applied to every tensor on its way (an adapter's `merged`).
        """
        values = dict(self.decoder.named_parameters()) | dict(weights or {})
        save_folder(Path(folder), self.folder, self.export(values), change)
        return Path(folder)


def load(
    name_or_path: str | Path,
    *,
    dtype: DType = "auto",
    device: torch.device | str = "cpu",
    base: str | Path = "",
    foreign: bool = False,
    listener: Listener = silent,
) -> Model:
    """A model by packaged name (`rung models` lists them), folder, .gguf file, or id of the Hub (`org/name@revision`);
    or a PEFT folder with a LoRA adapter, merged into the model it belongs to.

    dtype: auto is bf16 where the machine multiplies it fast, else fp32; device: cpu, cuda or cuda:1; base: the
    adapter's model, where what it calls it means nothing here; foreign: through transformers although Rung has the
    family (other families go that way anyhow).  Raises ModelError with what to do, ConfigError for a device that is not
    here.
    """
    place = open_device(str(device))
    if idle := idle_gpu(place):
        listener(Progress(stage="notice", text=idle))
    path, name, wanted = locate(name_or_path, listener), str(name_or_path), compute_dtype(dtype, place)
    change: Change = unchanged
    if is_adapter(path):
        path, change = _adapted(path, base, listener)
    if foreign or not _is_native(path):
        theirs, folder, export = load_foreign(path, dtype=wanted, device=place, listener=listener, change=change)
        return _foreign(theirs, folder, export, name, _text(folder.files, folder.config, path))
    decoder, folder = load_folder(path, dtype=wanted, device=place, listener=listener, change=change)
    return _native(decoder.eval(), folder, name, _text(folder.files, folder.config, path))


def outline(name_or_path: str | Path, *, foreign: bool = False, listener: Listener = silent) -> Model:
    """The model that `load` would give, as far as its shapes and its tokenizer go; no tensor of it is read."""
    path, name = locate(name_or_path, listener), str(name_or_path)
    raw = read_json(path / "config.json")
    folder, text = Folder(config=raw, shards=()), _text(read_files(path, COMPANIONS), raw, path)
    if foreign or not _is_native(path):
        return _foreign(foreign_outline(path), folder, dict, name, text)
    config = from_hugging_face(raw, where=str(path / "config.json"))
    return _native(Decoder(config, device="meta"), folder, name, text)


def _adapted(adapter: Path, base: str | Path, listener: Listener) -> tuple[Path, Change]:
    """The folder of an adapter's model, and what the adapter makes of its tensors."""
    factors, named = load_adapter(adapter)
    give = "Give the model that was adapted: rung.load(adapter, base=...), or base_model_name_or_path in its config."
    if not (wanted := base or named):
        raise ModelError(f"{adapter} is an adapter and does not say of which model. {give}")
    try:
        path = locate(wanted, listener)
    except ModelError as error:
        raise ModelError(f"{adapter} is an adapter of {str(wanted)!r}, which cannot be had: {error} {give}") from error
    factors.check(
        {entry.name: entry.shape for shard in read_shards(path) for entry in shard.entries}, where=str(adapter)
    )
    return path, factors.merged


def new_model(decoder: Decoder, name: str = "new", text: Tokenizer | None = None) -> Model:
    """A model around a decoder that was made here."""
    return _native(decoder, new_folder(decoder.config, next(decoder.parameters()).dtype), name, text)


def _native(decoder: Decoder, folder: Folder, name: str, text: Tokenizer | None) -> Model:
    export = partial(their_tensors, decoder.config, folder.config)
    sites = native_sites(decoder, hugging_face_names(folder.config))
    return Model(decoder=decoder, folder=folder, name=name, export=export, sites=sites, text=text)


def _foreign(decoder: ForeignDecoder, folder: Folder, export: Export, name: str, text: Tokenizer | None) -> Model:
    sites = linear_sites(decoder.model, decoder.model.get_output_embeddings())
    return Model(decoder=decoder, folder=folder, name=name, export=export, sites=sites, text=text)


def is_foreign(name_or_path: str | Path, *, foreign: bool = False) -> bool:
    """Does `load` take this model through transformers?"""
    return foreign or not _is_native(locate(name_or_path))


def _is_native(path: Path) -> bool:
    return read_json(path / "config.json").get("model_type") in FAMILIES


def _text(files: Mapping[str, bytes], config: Mapping[str, Any], path: Path) -> Tokenizer | None:
    return Tokenizer.from_files(files, config, where=str(path)) if "tokenizer.json" in files else None


def compute_dtype(dtype: str, device: torch.device | str = "cpu") -> torch.dtype:
    """What `auto` means here: bf16 on a GPU and on a CPU with AMX-BF16 or AVX512-BF16, else fp32."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}. {nearest(dtype, ['auto', *DTYPES])}")
        return DTYPES[dtype]
    # AVX2 machines are "supported" too, through emulation slower than fp32: hence not mkldnn's own word
    fast = (
        torch.device(device).type != "cpu"
        or torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
    )
    return torch.bfloat16 if fast else torch.float32
