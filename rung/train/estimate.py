"""What a run will need, before it starts: memory and time, from the model's shape and a short matrix product.

Memory is a sum of what is known to be held; activations are counted per token of a micro-batch (SmolLM2-135M, 2 025
tokens: logits and activations take 1.3 GB by this count and 1.5 GB by the process's peak in bf16, 2.5 and 2.4 in
fp32).  Time is the number of floating-point operations over the rate measured here and now, if every sample runs to its
limit and every group is learnt from: an upper end, two to three times what a run of short answers takes.

On a GPU all of it is counted alike and nothing was measured: not the memory, and not how far decoding, which waits for
memory there, falls behind its matrix products.  Where the GPU is not here, its memory and rate are not known.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rung.core.device import device_named, lacks, open_device
from rung.core.errors import ConfigError
from rung.core.memory import available_memory
from rung.core.progress import Listener, silent
from rung.core.words import Problem
from rung.engine.scheduler import prompt_slots
from rung.lm.adapters.lora import chosen, num_weights
from rung.lm.adapters.spec import LoRA
from rung.lm.linear import keeps_blocks
from rung.lm.protocols import Footprint
from rung.model.model import Model, compute_dtype
from rung.objectives.logprobs import CHUNK_ROWS
from rung.tasks.base import draw
from rung.tasks.load import load_task
from rung.train.checks import check_problems, weightless
from rung.train.config import GroupRL
from rung.train.evaluate import CHUNK
from rung.train.methods import needs_reference
from rung.train.session import check_recipe, use_threads

PROMPTS = 16  # whose tokens are counted
LIBRARY = 450e6  # bytes: Python, torch and tokenizers, as measured on an idle process
GPU_LIBRARY = 600e6  # bytes of a GPU: CUDA's context, kernels, cuBLAS's workspace; assumed
EFFICIENCY = 0.7  # share of the matrix product's rate that whole forward and backward passes reach
RATE_SIZE, RATE_REPEATS = (512, 2048, 2048), 4
GPU_RATE_SIZE, GPU_RATE_REPEATS = (8192, 4096, 4096), 16  # long beside the launch of a kernel


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """bytes and seconds of a whole run; `lines` say what they are made of.

    bytes: of the device's memory; seconds: NaN where the device is not here"""

    bytes: float
    seconds: float
    lines: tuple[str, ...]


def estimate(recipe: GroupRL) -> Estimate:
    """Memory and time that a recipe needs here.  Raises as `rung.train` does for a recipe that cannot run; a GPU that
    is not here is no reason."""
    check_recipe(recipe)
    use_threads(recipe.threads)
    task = load_task(recipe.task.name, recipe.task.options)  # what is wrong with it is said before a model is fetched
    model = weightless(recipe)
    check_problems(recipe, task)
    lengths = prompt_lengths(model, _problems(recipe))
    parts = memory(recipe, model, max(lengths))
    total = sum(parts.values())
    device = device_named(recipe.device)
    if not (lacking := lacks(device)):
        open_device(recipe.device)
    rate = math.nan if lacking else multiply_rate(compute_dtype(recipe.dtype, device), device)
    seconds = duration(recipe, model, rate, sum(lengths) / len(lengths))
    free = "a size not known here" if lacking else f"{free_memory(device) / 1e9:.1f} GB free"
    took = " unknown" if lacking else f"{seconds / 60:8.1f} min"
    lines = [f"{name:<24}{size / 1e9:8.2f} GB" for name, size in parts.items()]
    lines += [f"{'in all':<24}{total / 1e9:8.2f} GB, of {free}"]
    lines += [f"{'time':<24}{took} for {recipe.num_steps} steps, if every sample is as long as may be"]
    lines += [f"Counted for a device that is not here, on which nothing was measured: {lacking}"] if lacking else []
    return Estimate(bytes=total, seconds=seconds, lines=tuple(lines))


def refuse_too_large(recipe: GroupRL, listener: Listener = silent) -> None:
    """Raises ConfigError where the run cannot fit into the memory that this process may have."""
    problems = _problems(recipe)  # a task that is none is refused before a model is fetched
    model = weightless(recipe, listener)
    parts = memory(recipe, model, max(prompt_lengths(model, problems)))
    free = free_memory(device_named(recipe.device))
    if sum(parts.values()) > free:
        largest = max(parts, key=lambda name: parts[name])
        raise ConfigError(
            f"this run needs about {sum(parts.values()) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; the largest "
            f"part is {largest} with {parts[largest] / 1e9:.1f} GB. Make memory free, lower "
            "tokens_per_micro_batch, slots or max_tokens, set activation_checkpointing, or take a smaller model."
        )


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still have on a device."""
    if device.type == "cpu":
        return available_memory()
    torch.cuda.empty_cache()  # what an earlier run of this process left in PyTorch's own store
    return float(torch.cuda.mem_get_info(device)[0])


def _problems(recipe: GroupRL) -> list[Problem]:
    return draw(load_task(recipe.task.name, recipe.task.options), PROMPTS, seed=recipe.seed, step=1)


def prompt_lengths(model: Model, problems: Sequence[Problem]) -> list[int]:
    """Tokens of each problem's prompt."""
    return [len(model.prompt_ids(problem.messages)) for problem in problems]


def memory(recipe: GroupRL, model: Model, prompt: int) -> dict[str, float]:
    """Bytes held on the recipe's device at the peak of a step, by what holds them.  prompt: tokens of a long one."""
    footprint, learnt, lora = model.decoder.footprint(), num_learnt(model, recipe.lora), recipe.lora
    device = device_named(recipe.device)
    weights, dtype = footprint.parameters, compute_dtype(recipe.dtype, device)
    width, on_cpu = dtype.itemsize, device.type == "cpu"
    parts = {"libraries": LIBRARY if on_cpu else GPU_LIBRARY}
    parts |= {"weights, at rest": float(width * weights)} if lora.on else {}
    parts |= {
        "adapter in fp32" if lora.on else "fp32 weights": 4.0 * learnt,
        "adapter, compute copy" if lora.on else "compute copy": float(width * learnt) if width < 4 else 0.0,
        "gradients": 4.0 * learnt,
        "AdamW moments": 8.0 * learnt,
        "reference": float(width * weights) if needs_reference(recipe.method) and not lora.on else 0.0,
    }
    rows = positions(recipe, model.decoder.max_positions, prompt)
    parts["key-value cache"] = float(_slots(recipe) * rows * footprint.cached * width)
    parts["learner's logits"] = head_bytes(footprint, width, learnt=not lora.on, blocks=on_cpu)
    together = max(recipe.tokens_per_micro_batch, rows)  # a sequence is never cut
    parts["activations"] = float(together * activations(recipe, model) * width)
    if lora.on and keeps_blocks(device.type, dtype):  # else they are fewer than the gradients
        learner = parts["learner's logits"] + parts["activations"]
        parts["sampler beyond learner"] = max(0.0, float(width * weights) - learner)
    return parts


def positions(recipe: GroupRL, room: int, prompt: int) -> int:
    """Positions of a long episode in a model of `room` positions; the environment is taken to say as much as the prompt
    before each further answer."""
    return min(recipe.max_turns * (prompt + recipe.max_tokens), recipe.max_length or room, room)


def _slots(recipe: GroupRL) -> int:
    """Sequences that the engine holds at a time: samples, and prompts waiting to be copied.

    The most of a step's first turn, of its later ones (where every sample has a prompt of its own), of an evaluation.
    """
    samples, evaluated = recipe.prompts_per_step * recipe.samples_per_prompt, min(recipe.eval_problems, CHUNK)
    later = samples if recipe.max_turns > 1 else 0
    held = []
    for asked, prompts in ((samples, recipe.prompts_per_step), (later, later), (evaluated, evaluated)):
        decoding = min(recipe.slots, asked)
        held.append(decoding + min(prompt_slots(decoding), prompts))
    return max(held)


def activations(recipe: GroupRL, model: Model) -> int:
    """Numbers that one token leaves behind in a forward pass for its backward pass: with an adapter also every A x.

    With activation checkpointing: the inputs of all blocks, and the rest of one, while it is gone through again."""
    footprint = model.decoder.footprint()
    adapted = chosen(model.sites, recipe.lora) if recipe.lora.on else ()
    kept = footprint.activations + recipe.lora.rank * sum(len(site.parts) for site in adapted)
    if recipe.activation_checkpointing:
        return footprint.blocks * footprint.width + -(-kept // footprint.blocks)
    return kept


def head_bytes(footprint: Footprint, width: int, *, learnt: bool, blocks: bool) -> float:
    """Bytes of one chunk of the learner's logits, and of the head's gradient while chunks are summed, if it learns.

    blocks: a chunk's fp32 copies are made a few rows at a time (on a CPU), and not both at once of all its rows"""
    copies = 0 if blocks else 2 * 4
    return float(footprint.vocab_size * ((width + copies) * CHUNK_ROWS + (width + 4) * footprint.width * learnt))


def duration(recipe: GroupRL, model: Model, rate: float, prompt: float) -> float:
    """Seconds of a run of longest samples: 2 operations a weight and token forwards, 4 backwards, or 2 where it rests;
    2 more where the forward pass is repeated.

    prompt: tokens of one
    """
    weights, learnt = model.decoder.footprint().parameters, num_learnt(model, recipe.lora)
    whole = weights + learnt * recipe.lora.on  # of all matrices that a token passes
    turns, samples = recipe.max_turns, recipe.prompts_per_step * recipe.samples_per_prompt
    prompts = recipe.prompts_per_step * prompt
    own = recipe.max_tokens * turns + prompt * (turns - 1)  # tokens of an episode behind its prompt
    again = (turns - 1) * (prompt + turns * (prompt + recipe.max_tokens) / 2)  # read when its later turns begin
    rolled = 2.0 * whole * (prompts + samples * (recipe.max_tokens * turns + again))
    shared = recipe.share_prompts and model.decoder.branches
    packed = (prompts if shared else samples * prompt) + samples * own
    passed = (2 + recipe.activation_checkpointing) * whole + learnt + needs_reference(recipe.method) * weights
    learned = 2.0 * passed * packed
    evaluated = 2 * 2.0 * whole * recipe.eval_problems * (prompt + recipe.max_tokens * turns + again)
    return (recipe.num_steps * (rolled + learned) + evaluated) / (rate * EFFICIENCY)


def multiply_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a matrix product here, now, on a device, with the threads in use."""
    size, repeats = (RATE_SIZE, RATE_REPEATS) if device.type == "cpu" else (GPU_RATE_SIZE, GPU_RATE_REPEATS)
    rows, inner, columns = size
    a = torch.ones(rows, inner, dtype=dtype, device=device)
    b = torch.ones(inner, columns, dtype=dtype, device=device)
    float((a @ b)[0, 0])
    began = time.perf_counter()
    for _ in range(repeats):
        product = a @ b
    float(product[0, 0])  # a GPU's kernels are done when it has answered
    return 2.0 * rows * inner * columns * repeats / (time.perf_counter() - began)


def num_learnt(model: Model, lora: LoRA) -> int:
    """Number of weights that learn: the adapter's, or all.  Raises ConfigError for targets that name no layer."""
    return num_weights(chosen(model.sites, lora), lora) if lora.on else model.decoder.footprint().parameters
