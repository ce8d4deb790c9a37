"""An adapter on disk, in the layout of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`.

What is written here loads there, and what was written there loads here, or is refused with the field that Rung does not
compute: a field that is silently ignored would be another model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rung.core.errors import ConfigError, ModelError
from rung.core.shapes import Tensor
from rung.lm.adapters.lora import Factors
from rung.lm.adapters.spec import LoRA
from rung.lm.weights import hub
from rung.lm.weights.files import ADAPTER, CODES, DTYPES, Entry, Shard, read_header, read_json, tensors, write_shard
from rung.lm.weights.hf import written_whole

CONFIG, WEIGHTS = ADAPTER
PREFIX = "base_model.model."  # PEFT's wrapper around the model, as its names have it
A, B = ".lora_A.weight", ".lora_B.weight"
PLAIN: Mapping[str, Any] = {  # fields that make another model, and the value at which they make none
    "bias": "none",
    "init_lora_weights": True,  # others may have changed the base's weights (PiSSA, OLoRA, LoftQ, CorDA)
    "alpha_pattern": {},
    "rank_pattern": {},
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "modules_to_save": None,
}
MERGE = "Merge the adapter with PEFT (`merge_and_unload`), and load the model that it saves."
AGAIN = "Save the adapter again with PEFT (`save_pretrained(folder)`)."
HARMLESS = {"init_lora_weights": (False, "gaussian", "orthogonal")}  # the base is what it was


def is_adapter(folder: Path) -> bool:
    """Does this folder hold an adapter, and no model of its own?"""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def save_adapter(path: Path, factors: Factors, *, base: str) -> None:
    """Write an adapter's folder, which must not exist yet; `base` names the model it belongs to."""
    spec = factors.spec
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **_named(base),
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "use_rslora": spec.rslora,
        "target_modules": sorted(factors.pairs),
        **PLAIN,
    }
    held = {PREFIX + name + end: t for name, pair in factors.pairs.items() for end, t in zip((A, B), pair, strict=True)}
    entries = tuple(Entry(name, CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in held.items())
    with written_whole(path) as aside:
        write_shard(aside / WEIGHTS, Shard(file=WEIGHTS, entries=entries), lambda entry: held[entry.name])
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(path: Path) -> tuple[Factors, str]:
    """An adapter, and the name of the model it belongs to ("" where it has none).

    Raises ModelError for another method than LoRA, a variant of it, and tensors that are not those of the config.
    """
    raw = read_json(path / CONFIG)
    where = str(path / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise ModelError(f"{where}: peft_type is {raw.get('peft_type')!r}; Rung reads LORA. {MERGE}")
    for name, plain in PLAIN.items():
        given = raw.get(name)
        if given and given != plain and given not in HARMLESS.get(name, ()):
            raise ModelError(f"{where}: {name} is {given!r}; Rung computes plain LoRA, {name} {plain!r}. {MERGE}")
    try:
        spec = LoRA(rank=int(raw["r"]), alpha=float(raw["lora_alpha"]), rslora=bool(raw.get("use_rslora")))
    except KeyError as error:
        raise ModelError(f"{where} lacks the field {error}.") from error
    except (TypeError, ValueError, ConfigError) as error:
        raise ModelError(f"{where}: {error}") from error
    base, revision = str(raw.get("base_model_name_or_path") or ""), raw.get("revision")
    of_the_hub = hub.parse(base) is not None and "@" not in base and not Path(base).exists()
    return Factors(spec, _pairs(path, spec)), f"{base}@{revision}" if revision and of_the_hub else base


def _named(base: str) -> dict[str, str]:
    """PEFT writes the commit of a model of the Hub beside its id."""
    found = hub.parse(base)
    if found is None or "@" not in base or Path(base).exists():
        return {"base_model_name_or_path": base}
    return {"base_model_name_or_path": found.repo, "revision": found.revision}


def _pairs(path: Path, spec: LoRA) -> dict[str, tuple[Tensor, Tensor]]:
    if not (path / WEIGHTS).is_file():
        raise ModelError(f"{path} has no {WEIGHTS}. {AGAIN}")
    entries = {entry.name: entry for entry in read_header(path / WEIGHTS).entries}
    names = sorted({name.removeprefix(PREFIX).removesuffix(A).removesuffix(B) for name in entries})
    needed = {PREFIX + name + end: end for name in names for end in (A, B)}
    if strange := sorted(set(entries) ^ set(needed)):
        raise ModelError(f"{path / WEIGHTS}: {strange[0]!r} is one of no pair {PREFIX}LAYER{A} and {B}. {AGAIN}")
    for name, entry in entries.items():
        rank = entry.shape[0 if needed[name] == A else -1] if len(entry.shape) == 2 else None
        if rank != spec.rank or entry.dtype not in DTYPES:
            raise ModelError(
                f"{path / WEIGHTS}: {name!r} of shape {list(entry.shape)} and dtype {entry.dtype}; needed a matrix of "
                f"rank {spec.rank}, as {CONFIG} says, in {', '.join(DTYPES)}."
            )
    held = dict(tensors(path / WEIGHTS, entries))
    return {name: (held[PREFIX + name + A].clone(), held[PREFIX + name + B].clone()) for name in names}
