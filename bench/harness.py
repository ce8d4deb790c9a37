"""Ours and the peer in turn, A B A B, in one run: medians, ratios, the state of the machine, one JSON line.

Each side lives in its own process (`bench.worker`) and only one of them works at a time, so neither library's patches,
thread pools or memory touch the other.  Every side's first turn is a warm-up and is not counted.  Of several peers (a
library in bf16 and in fp32, say) the fastest at its warm-up goes on; the others' single turn is printed beside it.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BUSY = 0.10  # share of the cores that others may use before a number is called taken under load
Turn = Mapping[str, float]
Value = Callable[[Turn], float]


@dataclass(frozen=True, kw_only=True)
class Side:
    """A name to print, the job that `bench.worker` runs, and its specification."""

    name: str
    job: str
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every bench takes on the command line."""

    model: str
    repeats: int
    threads: int
    quick: bool
    only: str = ""

    def wants(self, part: str) -> bool:
        """Is this part of the bench to be run?"""
        return self.only in ("", part)


class SideFailedError(RuntimeError):
    """A side ended before it answered; the message is the end of what it printed."""


class Worker:
    """A side's process.  Leaving the `with` block ends it."""

    def __init__(self, side: Side, threads: int) -> None:
        self.name = side.name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", side.job, json.dumps({**side.spec, "threads": threads})],
            cwd=ROOT,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "OMP_NUM_THREADS": str(threads),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._answer()

    def turn(self, number: int) -> Turn:
        """Let it do turn `number`; the time is taken by the side itself, around the work alone."""
        print(number, file=self._process.stdin, flush=True)
        return self._answer()

    def jiffies(self) -> int:
        """Clock ticks that its process has used, children that have ended included."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15]))

    def close(self) -> None:
        """Close its stdin, which ends it."""
        if not self._errors.closed:
            self._process.communicate()
            self._errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Turn:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read()[-4000:]
            self.close()
            raise SideFailedError(f"{self.name} ended with code {code}:\n{said}")
        return json.loads(line)


def options(about: str | None, *, parts: Sequence[str] = (), model: bool = True) -> Options:
    """The command line of a bench; `parts` can be asked for alone, and it may need no language model."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", default="smollm2-135m" if model else "", help="packaged name or Hugging Face folder")
    parser.add_argument("--repeats", type=int, default=5, help="counted turns of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each side")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one turn: shows that it runs, no more")
    if parts:
        parser.add_argument("--only", choices=parts, default="", help="one part of this bench")
    given = parser.parse_args()
    return Options(
        model=folder_of(given.model) if given.model else "",
        repeats=1 if given.quick else given.repeats,
        threads=given.threads,
        quick=given.quick,
        only=given.only if parts else "",
    )


def folder_of(model: str) -> str:
    """The Hugging Face folder that both sides read."""
    from rung.lm.weights.sources import locate

    return str(locate(model))


def compare(
    what: str,
    ours: Side,
    peers: Sequence[Side],
    value: Value,
    *,
    unit: str,
    bar: str,
    given: Options,
    higher_is_better: bool = True,
) -> dict:
    """Measure, print and record one comparison; returns what was recorded.

    `value` turns a side's answer into the number compared.  The ratio says how many times better ours is.
    """
    print(f"\n{what}", flush=True)
    best, sign = (max, 1) if higher_is_better else (min, -1)
    trials: dict[str, float] = {}
    workers: dict[str, Worker] = {}
    load = Load()
    try:
        for side in [ours, *peers]:
            try:
                workers[side.name] = Worker(side, given.threads)
                trials[side.name] = value(workers[side.name].turn(0))
            except SideFailedError as failure:
                if side is ours:
                    raise
                print(f"  left out: {failure}", flush=True)
                continue
            print(f"  warm-up  {side.name:<34} {trials[side.name]:10.4g} {unit}", flush=True)
            fastest = best((p.name for p in peers if p.name in trials), key=lambda name: trials[name], default="")
            for name in [name for name in workers if name not in (ours.name, fastest)]:
                workers.pop(name).close()  # at once: three peers together may not fit into memory
        if not fastest:
            raise SideFailedError("no peer answered: there is nothing to compare with")
        turns: dict[str, list[Turn]] = {ours.name: [], fastest: []}
        for number in range(1, given.repeats + 1):
            for name, seen in turns.items():
                seen.append(load.watched(workers[name], number))
                print(f"  turn {number:>3} {name:<34} {value(seen[-1]):10.4g} {unit}", flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    numbers = {name: [value(turn) for turn in seen] for name, seen in turns.items()}
    pairs = [(a / b) ** sign for a, b in zip(numbers[ours.name], numbers[fastest], strict=True)]
    medians = {name: statistics.median(seen) for name, seen in numbers.items()}
    ratio = (medians[ours.name] / medians[fastest]) ** sign
    print(
        f"  median   {ours.name} {medians[ours.name]:.4g} {unit}, {fastest} {medians[fastest]:.4g} {unit}: "
        f"{ratio:.2f} times better (pairs {min(pairs):.2f} to {max(pairs):.2f}); bar {bar}"
    )
    result = {
        "what": what,
        "unit": unit,
        "bar": bar,
        "ratio": ratio,
        "pairs": pairs,
        "ours": ours.name,
        "peer": fastest,
        "turns": {name: list(map(dict, seen)) for name, seen in turns.items()},
        "warm_up": trials,
        "sides": [asdict(side) for side in (ours, *peers)],
        "quick": given.quick,
        **load.summary(),
    }
    record(result)
    return result


def measure(what: str, side: Side, value: Value, *, unit: str, bar: str, given: Options) -> dict:
    """Our side alone, against a bar that is a number."""
    print(f"\n{what}", flush=True)
    load = Load()
    with Worker(side, given.threads) as worker:
        worker.turn(0)
        turns = [load.watched(worker, number) for number in range(1, given.repeats + 1)]
    numbers = [value(turn) for turn in turns]
    median = statistics.median(numbers)
    print(f"  median   {median:.4g} {unit} ({min(numbers):.4g} to {max(numbers):.4g}); bar {bar}")
    result = {"what": what, "unit": unit, "bar": bar, "median": median, "turns": turns, "quick": given.quick}
    record(result | load.summary())
    return result


class Load:
    """What others do on this machine while a side works."""

    def __init__(self) -> None:
        self.others: list[float] = []
        self.stolen: list[float] = []

    def watched(self, worker: Worker, number: int) -> Turn:
        """A turn of the worker; what the cores did beside it is remembered."""
        busy, stolen, every = _jiffies()
        own = worker.jiffies()
        turn = worker.turn(number)
        busy_after, stolen_after, every_after = _jiffies()
        beside = busy_after - busy - (worker.jiffies() - own)
        self.others.append(max(beside, 0) / max(every_after - every, 1))
        self.stolen.append((stolen_after - stolen) / max(every_after - every, 1))
        return turn

    def summary(self) -> dict:
        """Printed, and part of the record: the share of the cores that others used, and that the host took away."""
        others, stolen = max(self.others, default=0.0), max(self.stolen, default=0.0)
        verdict = "idle" if others <= BUSY and stolen <= BUSY else "NOT IDLE: these numbers were taken under load"
        print(f"  machine  in the worst turn others used {others:.0%} of the cores, {stolen:.0%} was stolen: {verdict}")
        return {"others_busy": self.others, "stolen": self.stolen, "load_average": os.getloadavg()[0]}


def machine(threads: int) -> dict:
    """Processor, cores, threads, memory, library versions and what torch makes of the processor."""
    import torch

    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "unknown")
    flags = next((line.split() for line in info.splitlines() if line.startswith("flags")), [])
    return {
        "cpu": model,
        "bf16": [name for name in ("avx512_bf16", "amx_bf16") if name in flags],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def announce(given: Options) -> None:
    """Say on what machine, and with what load, the numbers below are taken."""
    facts = machine(given.threads)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"load average {os.getloadavg()[0]:.2f}; counted turns {given.repeats}", flush=True)


def record(result: Mapping[str, Any]) -> None:
    """Append to bench/results/results.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    threads = os.cpu_count() or 1
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with (RESULTS / "results.jsonl").open("a") as file:
        print(json.dumps({"when": when, "machine": machine(threads), **result}), file=file)


def seconds(turn: Turn) -> float:
    """Wall time of a turn."""
    return turn["seconds"]


def tokens_per_second(turn: Turn) -> float:
    """Sampled tokens of a turn over its wall time."""
    return turn["tokens"] / turn["seconds"]


def _jiffies() -> tuple[int, int, int]:
    """(busy, stolen, all) clock ticks of all cores since boot."""
    user, nice, system, idle, wait, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    busy = user + nice + system + irq + soft
    return busy, steal, busy + idle + wait + steal
