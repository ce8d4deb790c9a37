"""The inputs that both sides of a comparison get: made from a seed, without torch."""

import random
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

FIRST_WORD = 1000  # below it lie special tokens and single bytes


def prompts(count: int, low: int, high: int, *, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Token ids of `count` prompts of low ... high tokens; what they say does not change what they cost."""
    draw = random.Random(seed)
    return [[draw.randrange(FIRST_WORD, vocabulary) for _ in range(draw.randint(low, high))] for _ in range(count)]


def lengths(count: int, low: int, high: int, *, seed: int = 1) -> list[int]:
    """Forced lengths low ... high, the longest among them."""
    draw = random.Random(seed)
    return [high, *(draw.randint(low, high) for _ in range(count - 1))]


def question(a: int, b: int) -> str:
    """A sum, as the default recipe asks it."""
    return f"What is {a} + {b}? Answer with the number only."


def problems() -> list[dict[str, str]]:
    """The task of the step benches, in the form of a task file (`bench/workload.py:reward`)."""
    return [{"prompt": question(a, b)} for a in range(10, 100) for b in range(10, 100, 3)]


def reward(problem: Any, text: str) -> float:
    """A reward without meaning but with contrast in every group, so that neither side may skip one."""
    return zlib.crc32(text.encode()) % 997 / 997


def step(num_prompts: int, samples: int, max_tokens: int, micro_batch: int) -> dict[str, Any]:
    """The specification of a whole GRPO step; `micro_batch` in sequences."""
    return {"num_prompts": num_prompts, "samples": samples, "max_tokens": max_tokens, "micro_batch": micro_batch}


def uneven(groups: int, samples: int, prompt: Sequence[int], completion: Sequence[int]) -> Mapping[str, Any]:
    """A batch for the learner: prompts by group, completion lengths by sample (low, high)."""
    return {"groups": groups, "samples": samples, "prompt": list(prompt), "completion": list(completion)}


def batch(spec: Mapping[str, Any], vocabulary: int) -> list[tuple[list[int], list[list[int]], list[float]]]:
    """(prompt, completions, rewards) of every group of an `uneven` batch."""
    groups = []
    for number, prompt in enumerate(prompts(spec["groups"], *spec["prompt"], vocabulary=vocabulary)):
        draw = random.Random(number)
        sizes = lengths(spec["samples"], *spec["completion"], seed=100 + number)
        completions = [[draw.randrange(FIRST_WORD, vocabulary) for _ in range(size)] for size in sizes]
        groups.append((prompt, completions, [draw.random() for _ in sizes]))
    return groups
