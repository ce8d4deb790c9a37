"""What a run will need, before it starts: memory and time, from the model's shape and a short matrix product.

Memory is a sum of what is known to be held; activations are counted per token of a micro-batch (SmolLM2-135M, 2 025
tokens: logits and activations take 1.3 GB by this count and 1.5 GB by the process's peak in bf16, 2.5 and 2.4 in
fp32).  Time is the number of floating-point operations over the rate measured here and now, if every sample runs to its
limit and every group is learnt from: an upper end, two to three times what a run of short answers takes.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rung.core.errors import ConfigError
from rung.core.progress import Listener, silent
from rung.core.words import Problem
from rung.engine.scheduler import prompt_slots
from rung.lm.config import DecoderConfig
from rung.lm.decoder import Decoder
from rung.model.model import Model, compute_dtype, load
from rung.objectives.logprobs import CHUNK_ROWS
from rung.tasks.base import draw
from rung.tasks.load import load_task
from rung.train.checks import check_problems, weightless
from rung.train.config import GroupRL
from rung.train.methods import needs_reference
from rung.train.session import check_recipe, use_threads

PROMPTS = 16  # whose tokens are counted
LIBRARY = 450e6  # bytes: Python, torch and tokenizers, as measured on an idle process
EFFICIENCY = 0.7  # share of the matrix product's rate that whole forward and backward passes reach
CGROUP_FILES = {  # controllers in /proc/self/cgroup -> where their groups lie, and names in there; version 2, version 1
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
RATE_SIZE, RATE_REPEATS = (512, 2048, 2048), 4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """bytes and seconds of a whole run; `lines` say what they are made of."""

    bytes: float
    seconds: float
    lines: tuple[str, ...]


def estimate(recipe: GroupRL) -> Estimate:
    """Memory and time that a recipe needs here.  Raises as `rung.train` does for a recipe that cannot run."""
    check_recipe(recipe)
    use_threads(recipe.threads)
    model = load(recipe.model, dtype=recipe.dtype)
    config = model.decoder.config
    check_problems(recipe, load_task(recipe.task.name, recipe.task.options))
    lengths = prompt_lengths(model, _problems(recipe))
    parts = memory(recipe, config, max(lengths))
    total = sum(parts.values())
    rate = multiply_rate(compute_dtype(recipe.dtype))
    seconds = duration(recipe, num_parameters(config), rate, sum(lengths) / len(lengths))
    lines = [f"{name:<24}{size / 1e9:8.2f} GB" for name, size in parts.items()]
    lines += [f"{'in all':<24}{total / 1e9:8.2f} GB, of {available_memory() / 1e9:.1f} GB free"]
    lines += [f"{'time':<24}{seconds / 60:8.1f} min for {recipe.num_steps} steps, if every sample is as long as may be"]
    return Estimate(bytes=total, seconds=seconds, lines=tuple(lines))


def refuse_too_large(recipe: GroupRL, listener: Listener = silent) -> None:
    """Raises ConfigError where the run cannot fit into the memory that this process may have."""
    problems = _problems(recipe)  # a task that is none is refused before a model is fetched
    model = weightless(recipe, listener)
    parts = memory(recipe, model.decoder.config, max(prompt_lengths(model, problems)))
    free = available_memory()
    if sum(parts.values()) > free:
        largest = max(parts, key=lambda name: parts[name])
        raise ConfigError(
            f"this run needs about {sum(parts.values()) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; the largest "
            f"part is {largest} with {parts[largest] / 1e9:.1f} GB. Make memory free, lower "
            "tokens_per_micro_batch, slots or max_tokens, or take a smaller model."
        )


def _problems(recipe: GroupRL) -> list[Problem]:
    return draw(load_task(recipe.task.name, recipe.task.options), PROMPTS, seed=recipe.seed, step=1)


def prompt_lengths(model: Model, problems: Sequence[Problem]) -> list[int]:
    """Tokens of each problem's prompt."""
    return [len(model.prompt_ids(problem.messages)) for problem in problems]


def memory(recipe: GroupRL, config: DecoderConfig, prompt: int) -> dict[str, float]:
    """Bytes held at the peak of a step, by what holds them.  prompt: tokens of a long one."""
    weights, width = num_parameters(config), compute_dtype(recipe.dtype).itemsize
    parts = {
        "libraries": LIBRARY,
        "fp32 weights": 4.0 * weights,
        "compute copy": float(width * weights) if width < 4 else 0.0,
        "gradients": 4.0 * weights,
        "AdamW moments": 8.0 * weights,
        "reference": float(width * weights) if needs_reference(recipe.method) else 0.0,
    }
    rows = positions(recipe, config.max_positions, prompt)
    per_row = sum(2 * block.mixer.kv_heads * block.mixer.head_dim for block in config.blocks) * width
    parts["key-value cache"] = float(_slots(recipe) * rows * per_row)
    parts["learner's logits"] = head_bytes(config, width)
    parts["activations"] = float(recipe.tokens_per_micro_batch * activation_bytes(config, width))
    return parts


def positions(recipe: GroupRL, room: int, prompt: int) -> int:
    """Positions of a long episode in a model of `room` positions; the environment is taken to say as much as the prompt
    before each further answer."""
    return min(recipe.max_turns * (prompt + recipe.max_tokens), recipe.max_length or room, room)


def _slots(recipe: GroupRL) -> int:
    """Sequences that the engine holds at a time: samples, and prompts waiting to be copied."""
    decoding = min(recipe.slots, recipe.prompts_per_step * recipe.samples_per_prompt)
    return decoding + min(prompt_slots(decoding), recipe.prompts_per_step)


def activation_bytes(config: DecoderConfig, width: int) -> float:
    """Bytes that one token leaves behind in a forward pass for its backward pass."""
    total = 0.0
    for block in config.blocks:
        mixer = 2 * (block.mixer.heads + block.mixer.kv_heads) * block.mixer.head_dim
        total += width * (4 * config.width + mixer + 3 * block.channel.width)
    return total


def head_bytes(config: DecoderConfig, width: int) -> float:
    """Bytes of one chunk of the learner's logits, and of the head's gradient while chunks are summed."""
    return float(config.vocab_size * (width * CHUNK_ROWS + (width + 4) * config.width))


def duration(recipe: GroupRL, weights: int, rate: float, prompt: float) -> float:
    """Seconds of a run of longest samples: 2 operations a weight and token forwards, 4 backwards.

    prompt: tokens of one
    """
    prompts = recipe.prompts_per_step * prompt
    sampled = recipe.prompts_per_step * recipe.samples_per_prompt * recipe.max_tokens * recipe.max_turns
    rolled = 2.0 * weights * (prompts + sampled)
    learned = (8.0 if needs_reference(recipe.method) else 6.0) * weights * (prompts + sampled)
    evaluated = 2 * 2.0 * weights * recipe.eval_problems * (prompt + recipe.max_tokens)
    return (recipe.num_steps * (rolled + learned) + evaluated) / (rate * EFFICIENCY)


def multiply_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product here, now, with the threads in use."""
    rows, inner, columns = RATE_SIZE
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    a @ b
    began = time.perf_counter()
    for _ in range(RATE_REPEATS):
        a @ b
    return 2.0 * rows * inner * columns * RATE_REPEATS / (time.perf_counter() - began)


def num_parameters(config: DecoderConfig) -> int:
    """Number of weights, counted on a decoder that holds none."""
    return sum(p.numel() for p in Decoder(config, device="meta").parameters())


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that can still be had without swapping (Linux; elsewhere all that is installed): the machine's, or what
    the nearest limit of a control group leaves, as a container has one."""
    try:
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        free = float(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min([free, *_rooms(root)])


def _rooms(root: Path) -> Iterator[float]:
    """What each control group around this process still allows; files that can be dropped are not counted as used."""
    try:
        own = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, kinds, name in own:
        if kinds not in CGROUP_FILES:
            continue
        top, limit, usage, droppable = CGROUP_FILES[kinds]
        place = root / top / name.strip("/")
        for folder in (place, *place.parents):  # in a container the name may be the host's, and only the top be there
            if not folder.is_relative_to(root / top):
                break
            try:
                used = int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield float((folder / limit).read_text()) - used + int(stat.get(droppable, 0))
            except (OSError, ValueError):  # no such file, or no limit: "max"
                continue
