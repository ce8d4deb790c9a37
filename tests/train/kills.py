"""A real `rung train` that is killed with -9 in a phase of one's choice, and what its continuation must equal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PHASES = {  # of which step: every third is evaluated, every second saved, and the eighth is the last
    "baseline": 0,
    "sample": 3,
    "grade": 3,
    "backward": 3,
    "update": 3,
    "record": 3,
    "checkpoint": 4,
    "evaluate": 8,
    "model": 8,
}
DEADLINE = 120.0  # seconds


def command(*words) -> list[str]:
    return [sys.executable, "-m", "rung.cli.main", *map(str, words)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def kill_in(phase: str, delay: float, recipe_file: Path, folder: Path) -> str:
    """Start a run, kill its process group `delay` seconds after it enters `phase`; the last phase logged."""
    process = subprocess.Popen(
        command("train", recipe_file, "--folder", folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )
    log, deadline = folder / "log.txt", time.monotonic() + DEADLINE
    try:
        while not (log.exists() and f"{PHASES[phase]} {phase}\n" in log.read_text()):
            assert process.poll() is None, f"the run ended before it came to {phase}"
            assert time.monotonic() < deadline, f"the run never came to {phase}"
            time.sleep(0.0005)
        time.sleep(delay)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return log.read_text().splitlines()[-1].split()[1]


def check_continuation(folder: Path, whole: Path, *more: str) -> None:
    """Resume the run, and compare what it leaves with an uninterrupted one, and `more` of its files."""
    subprocess.run(command("resume", folder), check=True, capture_output=True, env=environment())
    for name in ("samples.jsonl", "evals.jsonl", "model/model.safetensors", *more):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    newest = "checkpoints/step-00000008"
    for name in ("masters", "adam_m", "adam_v"):
        file = f"{newest}/{name}.safetensors"
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), name
