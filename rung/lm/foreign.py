"""Any causal language model of `transformers` behind `protocols.ModelDecoder`; needs the extra `transformers`.

What the model must be like (causal, blind to its neighbours in a batch, its logits a matrix times the hidden state) is
not believed but tried when it is loaded.  `transformers` is handed a config and tensors and reads no file itself: what
is not safetensors is never opened, code that a folder brings is never run, nothing is fetched.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rung.core.errors import ModelError, nearest
from rung.core.progress import Listener, Progress, silent
from rung.core.records import Layout
from rung.core.shapes import Tensor
from rung.lm.weights.families import FAMILIES
from rung.lm.weights.files import COMPANIONS, INDEX, Shard, read_files, read_json, read_shards, tensors
from rung.lm.weights.hf import Change, Export, Folder, unchanged
from rung.lm.wrapper import ForeignDecoder, Rows

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")  # names of a constant before or after the head
CAPS = ("final_logit_softcapping", "logits_soft_cap")  # names of a soft cap
SWITCHES = (  # of config.json, that are not for us: code, other files, kernels to fetch
    *("auto_map", "fusion_config", "transformers_weights", "quantization_config", "custom_generate"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
)
# relative distance that rounding explains
NOISE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
SLACK = 1 << 20  # weights: a model that lacks fewer gets an error that names one
LOUD = 30.0  # standard deviation of the logits that the head is tried with: a soft cap shows there


@torch.inference_mode(False)  # a learner may take the weights, wherever they were loaded
def load_foreign(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    listener: Listener = silent,
    change: Change = unchanged,
) -> tuple[ForeignDecoder, Folder, Export]:
    """A decoder, what else its folder held, and the way from its parameters to the tensors of its files.

    change: applied to every tensor as the file has it.  Says by one notice that it is slower.  Raises ModelError where
    the extra is missing, for a folder that is no plain causal language model, and for a model whose tokens or logits
    are not what they must be.
    """
    raw = read_json(path / "config.json")
    kind = _architecture(raw, path)
    shards = read_shards(path)
    _refuse_larger(kind, shards, path)
    values: dict[str, Tensor] = {}
    total = sum(len(shard.entries) for shard in shards)
    for shard in shards:
        for name, value in tensors(path / shard.file, [entry.name for entry in shard.entries]):
            values[name] = change(name, value)
            listener(Progress(stage="load", done=len(values), total=total))
    with _quiet(), _their_errors(path):
        model, told = kind.model.from_pretrained(
            None,
            config=kind.config,
            state_dict=values,
            dtype=dtype,
            attn_implementation="sdpa" if kind.model._supports_sdpa else "eager",
            ignore_mismatched_sizes=True,  # they are told of, and refused here
            output_loading_info=True,
        )
    told["unexpected_keys"] = [name for name in told["unexpected_keys"] if not _is_table(values[name])]
    for what, names in told.items():
        if names:
            named = ", ".join(sorted(map(str, names))[:3])
            raise ModelError(f"{path}: its tensors are not those of {kind.model.__name__} ({what}: {named}).")
    index = read_json(path / INDEX) if (path / INDEX).is_file() else {}
    folder = Folder(
        config=raw,
        shards=shards,
        index={key: value for key, value in index.items() if key != "weight_map"},
        files=read_files(path, COMPANIONS),
        path=path,
    )
    export = _export(model, folder, path)
    return _tried(model.to(device), path, listener), folder, export


def foreign_outline(path: Path) -> ForeignDecoder:
    """The decoder of a folder without its weights, on the device `meta`: its shapes, to be counted."""
    return _outline(_architecture(read_json(path / "config.json"), path), path)


def _outline(kind: "_Architecture", path: Path) -> ForeignDecoder:
    with _quiet(), _their_errors(path), torch.device("meta"):
        return ForeignDecoder(kind.model(kind.config))


def _refuse_larger(kind: "_Architecture", shards: Sequence[Shard], path: Path) -> None:
    """A config of far more weights than there are would fill the memory before anybody noticed that they lack."""
    needed = sum(parameter.numel() for parameter in _outline(kind, path).parameters())
    held = sum(math.prod(entry.shape) for shard in shards for entry in shard.entries)
    if needed > 2 * held + SLACK:
        raise ModelError(f"{path}: config.json describes a model of {needed} weights, and the files hold {held}.")


@dataclass(frozen=True)
class _Architecture:
    """A config and a model class of transformers."""

    config: Any
    model: Any


def _architecture(raw: Mapping[str, Any], path: Path) -> _Architecture:
    """What transformers makes of a config.json.  Raises ModelError for what is no plain causal language model."""
    if not isinstance(kind := raw.get("model_type"), str):
        raise ModelError(f"{path}: config.json needs the field 'model_type', a name, and has {kind!r} there.")
    _import(kind, path)
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, __version__

    if raw.get("quantization_config"):
        raise ModelError(
            f"{path}: the weights are quantised; needed plain safetensors in fp32, fp16 or bf16. Take the folder that "
            "they were made from, or its GGUF."
        )
    if kind not in CONFIG_MAPPING:
        code = " The folder brings code of its own (auto_map), which is never run." if raw.get("auto_map") else ""
        known = nearest(kind, [*FAMILIES, *CONFIG_MAPPING])
        raise ModelError(f"{path}: there is no model family {kind!r}. {known} (transformers {__version__}){code}")
    with _quiet(), _their_errors(path):
        config = CONFIG_MAPPING[kind].from_dict({key: value for key, value in raw.items() if key not in SWITCHES})
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{path}: {kind!r} is no causal language model (an encoder, or encoder and decoder); needed one that "
            "continues text token by token."
        )
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    meant = raw.get("architectures") or [model.__name__]
    if model.__name__ not in meant:
        raise ModelError(f"{path}: config.json says that this is a {meant[0]}; needed a {model.__name__}.")
    return _Architecture(config if model.config_class is type(config) else config.get_text_config(), model)


def _import(kind: str, path: Path) -> None:
    """Raises ModelError where transformers is missing."""
    # with the package `kernels` beside it, transformers would fetch compiled code from the network
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        lacks = f"Rung has no model family {kind!r}. {nearest(kind, FAMILIES)}"
        asked = "it was to be loaded as foreign." if kind in FAMILIES else lacks
        raise ModelError(
            f"{path}: {asked} Two ways out: `pip install 'rung[transformers]'`, through which every causal language "
            "model of transformers runs, though slower; or a model of a family that Rung has."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Their warnings and progress bars off: a library does not print."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _their_errors(path: Path) -> Iterator[None]:
    """Whatever their code raises over a folder, as an error for a person."""
    from transformers import __version__

    try:
        yield
    except ModelError as error:
        raise ModelError(f"{path}: {error}.") from error
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"{path}: transformers {__version__} cannot make this model ({said}).") from error


@torch.no_grad()
def _tried(model: Any, path: Path, listener: Listener) -> ForeignDecoder:
    """The decoder of a model that behaves as one must.  Raises ModelError for one that does not."""
    noise = NOISE[model.dtype]
    versions = [parameter._version for parameter in model.parameters()]
    with _quiet(), _their_errors(path):
        decoder = _with_head(model, noise)
        ids = [(11 + 37 * i) % decoder.head_weight().shape[0] for i in range(10)]
        sequences = [ids[:8], ids[:2] + ids[6:]]  # the second one is padded behind, and beside the first
        alone = [decoder.body(torch.tensor([sequence], device=model.device))[0] for sequence in sequences]
        beside = decoder.body(torch.tensor([sequences[0], sequences[1] + [0, 0]], device=model.device))
        if not all(_apart(b[: len(a)], a) < noise for a, b in zip(alone, beside, strict=True)):
            raise ModelError("a token depends on what stands behind or beside it: this is no causal model")
        if versions != [parameter._version for parameter in model.parameters()]:
            raise ModelError("it changes its own weights when it is run")
    slow = ""
    try:
        with _quiet():
            rows = _kept(model, ids)
            quick = ForeignDecoder(model, scale=decoder.scale, logit_softcap=decoder.logit_softcap, rows=rows)
            if not all(_apart(b, a) < noise for a, b in zip(alone, _stepwise(quick, sequences), strict=True)):
                raise ModelError("in a batch of unequal lengths its cache changes the result")
        decoder = quick
    except Exception as error:  # their code may raise anything: it is right without a cache, too
        slow = f", and every new token costs its whole sequence again ({' '.join(str(error).split())[:150]})"
    listener(Progress(stage="notice", text=f"{path.name} runs through transformers: slower than Rung's families{slow}"))
    return decoder.eval()


def _with_head(model: Any, noise: float) -> ForeignDecoder:
    """The decoder whose logits are the model's: scale and cap are found among the constants that the config names, by
    logits large enough to show them."""
    config, head = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    if model.base_model is model or not isinstance(head, nn.Linear):
        raise ModelError(f"its head is a {type(head).__name__}; needed one matrix behind a body of its own")
    ids_1N = torch.arange(8, device=model.device)[None] % head.weight.shape[0]
    louder = LOUD / float(F.linear(ForeignDecoder(model).body(ids_1N)[..., : head.weight.shape[1]], head.weight).std())
    hook = head.register_forward_pre_hook(lambda _, args: (args[0] * louder,))
    logits_NV = model(input_ids=ids_1N, use_cache=False).logits[0]
    hook.remove()
    named = [float(getattr(config, name, None) or 1.0) for name in SCALES]
    caps = {0.0, *(float(getattr(config, name, None) or 0.0) for name in CAPS)}
    tries = {}
    for scale, cap in product({1.0, *named, *(1 / value for value in named)}, caps):
        loud = ForeignDecoder(model, scale=scale * louder, logit_softcap=cap)
        tries[_apart(loud.head(loud.body(ids_1N)[0]), logits_NV)] = scale, cap
    if not min(tries) < noise:
        raise ModelError("its logits are not a matrix times the last hidden state")
    scale, cap = tries[min(tries)]
    return ForeignDecoder(model, scale=scale, logit_softcap=cap)


def _kept(model: Any, ids: Sequence[int]) -> Rows:
    """The shape of what its cache keeps.  Raises ModelError where that is not keys and values of every token."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    if kinds != {DynamicLayer.__name__}:
        raise ModelError(f"it keeps {', '.join(sorted(kinds))}")
    cache: Any = DynamicCache()
    model.base_model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    if any(layer.keys is None for layer in cache.layers) or not cache.layers:
        raise ModelError("it does not fill its cache")
    shapes = {(x.shape[1], x.shape[3]) for layer in cache.layers for x in (layer.keys, layer.values)}
    if len(shapes) > 1:
        raise ModelError("its keys and values are of unequal shapes")
    kv_heads, head_dim = shapes.pop()
    return Rows(layers=len(cache.layers), kv_heads=kv_heads, head_dim=head_dim, cache=DynamicCache)


def _stepwise(decoder: ForeignDecoder, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Hidden states of two sequences of unequal lengths: begun, a step each, then the rest at once."""
    state, place = decoder.new_state(2, 16), decoder.model.device
    parts: list[list[Tensor]] = [[], []]
    done = [0, 0]
    for ends in ([5, 2], [6, 3], [len(sequence) for sequence in sequences]):
        new = [sequence[start:end] for sequence, start, end in zip(sequences, done, ends, strict=True)]
        lengths = [len(part) for part in new]
        layout = Layout.chains(lengths, starts=done)
        hidden_TD = decoder(torch.tensor([*new[0], *new[1]], device=place), layout, state)
        state.commit(torch.arange(2), torch.arange(max(lengths)).expand(2, -1), torch.tensor(lengths))
        for part, hidden in zip(parts, hidden_TD.split(lengths), strict=True):
            part.append(hidden)
        done = ends
    return [torch.cat(part) for part in parts]


def _apart(found_ND: Tensor, wanted_ND: Tensor) -> float:
    """Relative distance of two rows, the median over all (a router may send a few elsewhere); NaN is infinity."""
    found_ND, wanted_ND = found_ND.float(), wanted_ND.float()
    distance = float(((found_ND - wanted_ND).norm(dim=-1) / wanted_ND.norm(dim=-1)).median())
    return distance if distance == distance else float("inf")


def _is_table(value: Tensor) -> bool:
    """No weights, if transformers does not ask for it: a mask, a constant, frequencies."""
    return value.ndim < 2 or not value.is_floating_point()


def _export(model: Any, folder: Folder, path: Path) -> Export:
    """From our parameters by name to the tensors of the folder's files, by the way back of transformers' conversions.

    What is no weight (a table, a part that transformers does not read) is copied from the folder.  Raises ModelError
    where a weight would find no place in the files."""
    from transformers.core_model_loading import revert_weight_conversion

    shared = dict(model.named_parameters(remove_duplicate=False))
    ours = {id(parameter): f"model.{name}" for name, parameter in model.named_parameters()}
    prefix = f"{model.base_model_prefix}."  # a folder of the body alone leaves it out

    def weights_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {name: weights[ours[id(parameter)]].detach() for name, parameter in shared.items()}
        with _quiet():
            back = revert_weight_conversion(model, named)
        return {name.removeprefix(prefix): value for name, value in back.items()} | back

    def theirs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = weights_of(weights)
        for shard in folder.shards:
            found |= tensors(path / shard.file, [e.name for e in shard.entries if e.name not in found])
        return found

    found = weights_of({ours[id(parameter)]: parameter.to("meta") for parameter in shared.values()})
    held = {entry.name: entry.shape for shard in folder.shards for entry in shard.entries}
    second = {name for name, parameter in shared.items() if ours[id(parameter)] != f"model.{name}"}
    lost = [name for name in found if not {name, prefix + name, name.removeprefix(prefix)} & (held.keys() | second)]
    lost += [name for name, shape in held.items() if name in found and tuple(found[name].shape) != shape]
    if lost:
        raise ModelError(f"{path}: tensor {lost[0]!r} could not be written back as it was read.")
    return theirs
