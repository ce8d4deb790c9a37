"""A run folder as a value.  Text is read from the folder only: no model, no tokenizer, no network.

The folder may belong to a run that is still going, was killed, or never took a step: every part may be missing, and a
last line that was cut off is left out.  What was left out is said (`Record.notes`), not hidden.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rung.core.rundir import open_run

Row = Mapping[str, Any]

Z_95 = 1.959963984540054  # 97.5 % point of the normal distribution
RUNS = "runs"  # where runs are kept, under the current folder
TAIL_BYTES = 4 << 20  # of samples.jsonl: its newest part is enough


@dataclass(frozen=True)
class Accuracy:
    """A held-out accuracy after `step` optimiser steps, with its 95 % confidence interval (Wilson), on `n` problems."""

    step: int
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Pair:
    """One held-out problem and what the model said first and last."""

    problem: str
    prompt: str
    answer: str
    before: Row
    after: Row

    @property
    def kind(self) -> str:
        """became right, still right, still wrong, became wrong"""
        was, now = bool(self.before.get("right")), bool(self.after.get("right"))
        return {(0, 1): "became right", (1, 1): "still right", (0, 0): "still wrong", (1, 0): "became wrong"}[was, now]


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything a folder says about a run.

    config, environment: as written at the start, {} where missing
    train:      one row per optimiser step
    accuracies: held-out evaluations by step; validation: those on the third set of problems
    pairs:      the problems of the first and the last evaluation, where both have answers
    group:      the samples of one problem of the newest step
    notes:      what could not be read
    """

    folder: Path
    config: Row
    environment: Row
    train: Sequence[Row]
    accuracies: Sequence[Accuracy]
    validation: Sequence[Accuracy]
    seconds_evaluating: float
    pairs: Sequence[Pair]
    group: Sequence[Row]
    notes: Sequence[str]

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def num_steps(self) -> int:
        """Steps that the configuration asks for; 0 where it is missing."""
        return int(self.config.get("num_steps") or 0)

    @property
    def finished(self) -> bool:
        """Whether the last step was taken, measured where the run measures, and its model written."""
        measured = [accuracy.step for accuracy in self.accuracies] or [self.num_steps]
        return 0 < self.num_steps <= min(len(self.train), max(measured)) and (self.folder / "model").is_dir()

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a training metric, where it is there and finite."""
        values = [(float(row["step"]), _number(row.get(name))) for row in self.train]
        return [(step, value) for step, value in values if value is not None]

    def total(self, name: str) -> float:
        """Sum of a training metric over the steps."""
        return math.fsum(value for _, value in self.points(name))


def read_run(folder: str | Path) -> Record:
    """Raises RunError where there is no run, or one of another format."""
    folder = open_run(folder).folder
    notes: list[str] = []
    metrics = _lines(folder / "metrics.jsonl", notes)
    evals = [row for row in metrics if row.get("kind") == "eval"]
    steps = {row["step"]: row for row in metrics if row.get("kind") == "train" and _number(row.get("step")) is not None}
    return Record(
        folder=folder,
        config=_object(folder / "config.json", notes),
        environment=_object(folder / "environment.json", notes),
        train=[steps[step] for step in sorted(steps)],
        accuracies=_accuracies(evals, "held_out"),
        validation=_accuracies(evals, "validation"),
        seconds_evaluating=math.fsum(_number(row.get("seconds")) or 0.0 for row in evals),
        pairs=_pairs(_lines(folder / "evals.jsonl", notes)),
        group=_newest_group(_lines(folder / "samples.jsonl", notes, tail=TAIL_BYTES)),
        notes=notes,
    )


def find_run(name: str) -> Path:
    """The folder of a run given by path, or by its name under RUNS."""
    path = Path(name)
    return path if path.exists() or not (Path(RUNS) / name).exists() else Path(RUNS) / name


def wilson(right: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Bounds of a share of `right` in `n` independent trials.  [Wilson 1927]

    (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)  with  p = right / n; never outside [0, 1], and of
    positive width at p = 0 and p = 1, unlike p ± z sqrt(p(1-p)/n).
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"wilson needs 0 <= right <= n and n >= 1, got right={right}, n={n}")
    share, slack = right / n, z * z / n
    centre = share + slack / 2
    half = z * math.sqrt(share * (1 - share) / n + slack / (4 * n))
    low, high = (centre - half) / (1 + slack), (centre + half) / (1 + slack)
    return (0.0 if right == 0 else low), (1.0 if right == n else high)


def flat(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """A nested object as (dotted name, value written in JSON) pairs; texts stay as they are."""
    if isinstance(value, Mapping) and (value or not prefix):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _object(path: Path, notes: list[str]) -> Row:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        notes.append(f"{path.name} could not be read ({error}).")
        return {}
    return value if isinstance(value, Mapping) else {}


def _lines(path: Path, notes: list[str], *, tail: int = 0) -> list[Row]:
    """The objects of a JSONL file (of its last `tail` bytes); lines that are none are counted in `notes`."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        if 0 < tail < path.stat().st_size:
            file.seek(-tail, 2)
            file.readline()  # begins in the middle
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    rows, bad = [], 0
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, Mapping):
            rows.append(row)
        else:
            bad += 1
    if bad:
        notes.append(f"{path.name}: {bad} {'line' if bad == 1 else 'lines'} could not be read (cut off?) and left out.")
    return rows


def _accuracies(rows: Iterable[Row], split: str) -> list[Accuracy]:
    """Evaluations on a split that have a value, by step; an interval that was not recorded is computed."""
    found = []
    for row in rows:
        value, low, high = (_number(row.get(name)) for name in ("accuracy", "low", "high"))
        step, n = _number(row.get("step")), int(_number(row.get("n")) or 0)
        if value is None or step is None or row.get("split", "held_out") != split:
            continue
        if low is None or high is None:
            low, high = wilson(round(value * n), n) if n else (0.0, 1.0)
        found.append(Accuracy(int(step), value, low, high, n))
    return sorted(found, key=lambda accuracy: accuracy.step)


def _pairs(rows: Sequence[Row]) -> list[Pair]:
    rows = [row for row in rows if row.get("split", "held_out") == "held_out" and _number(row.get("step")) is not None]
    steps = sorted({row["step"] for row in rows})
    if len(steps) < 2:
        return []
    first, last = (
        {row.get("problem"): row for row in rows if row.get("step") == step} for step in (steps[0], steps[-1])
    )
    return [
        Pair(str(name), str(row.get("prompt", "")), str(row.get("answer", "")), row, last[name])
        for name, row in first.items()
        if name in last
    ]


def _newest_group(rows: Sequence[Row]) -> list[Row]:
    """The samples of the problem that was written last."""
    group = [(row.get("step"), row.get("problem"), row.get("draw")) for row in rows]
    return [row for row, name in zip(rows, group, strict=True) if name == group[-1]]
