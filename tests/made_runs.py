"""Made-up run folders, written by the code that writes real ones."""

import math
import random
from dataclasses import replace
from pathlib import Path

from rung.core.rundir import RunDir, create
from rung.report.load import wilson
from rung.train.config import GroupRL, TaskSpec

RECIPE = GroupRL(name="made-up", task=TaskSpec(name="arithmetic", options={"digits": 2}), num_steps=60, eval_every=20)
ENVIRONMENT = {"rung": "0.1.0", "torch": "2.13.0", "cpu": "a made-up machine", "threads": 2}


def eval_row(step: int, right: int, n: int, split: str = "held_out") -> dict:
    low, high = wilson(right, n)
    return {"kind": "eval", "step": step, "split": split, "accuracy": right / n, "low": low, "high": high, "n": n}


def train_row(step: int, of: int, noise: random.Random) -> dict:
    done = step / of
    reward = min(1.0, max(0.0, 1 / (1 + math.exp(4 - 9 * done)) + noise.gauss(0, 0.05)))
    return {
        "kind": "train",
        "step": step,
        "reward": reward,
        "right": reward,
        "length": 9 - 6 * done + noise.gauss(0, 0.3),
        "entropy": 1.2 * math.exp(-3 * done) + abs(noise.gauss(0, 0.03)),
        "kl_k3": 0.4 * done + abs(noise.gauss(0, 0.01)),
        "clip_share": 0.0,
        "no_signal": abs(2 * done - 1) * 0.6,
        "gap_mean": 2e-3 * math.exp(noise.gauss(0, 0.2)),
        "gap_max": 6e-2 * math.exp(noise.gauss(0, 0.4)),
        "loss": noise.gauss(0, 0.02),
        "grad_norm": 2 + noise.gauss(0, 0.3),
        "lr": 1e-5 * (1 - done),
        "tokens": 1100,
        "unknown": 0,
        "ended": min(1.0, 0.5 + done),
        "seconds_prefill": 0.4,
        "seconds_decode": 2.1,
        "seconds_grade": 0.1,
        "seconds_learn": 4.2,
        "seconds": 7.0,
    }


def answers(step: int, right_of: int, n: int) -> list[dict]:
    rows = []
    for i in range(n):
        a, b, right = 10 + i, 3 * i + 7, i % 10 < right_of
        text = f"{a + b}" if right else f"The answer is {a + b + 1}, because\nI guess so."
        rows.append(
            {"step": step, "problem": f"{a}+{b}", "prompt": f"What is {a} + {b}?", "text": text, "answer": f"{a + b}"}
            | {"right": right, "stop": "eos" if right else "length"}
        )
    return rows


def samples(step: int) -> list[dict]:
    scores = [1, 0, 0, 1, 1, 0, 1, 1]
    return [
        {"step": step, "problem": "17+25", "draw": 0, "sample": i, "key": i, "prompt": "What is 17 + 25?"}
        | {"text": "42" if score else f"4{i}", "token_ids": [36, 34, 2], "stop": "eos", "score": score}
        | {"right": bool(score), "known": True, "advantage": score - 0.625}
        for i, score in enumerate(scores)
    ]


def finished_run(folder: Path, steps: int = 60, recipe: GroupRL = RECIPE) -> RunDir:
    """A whole run that went well, evaluated at the start, at each third, and at the end."""
    run = create(folder, replace(recipe, num_steps=steps), ENVIRONMENT)
    noise = random.Random(0)
    for step in range(1, steps + 1):
        run.append("metrics", [train_row(step, steps, noise)])
    run.append("metrics", [eval_row(0, 62, 500), eval_row(steps, 487, 500)])
    run.append("metrics", [eval_row(steps // 3 * k, right, 128, "validation") for k, right in ((1, 62), (2, 117))])
    run.append("evals", [*answers(0, 1, 40), *answers(steps, 9, 40)])
    run.append("samples", samples(steps))
    (run.folder / "model").mkdir()
    return run
