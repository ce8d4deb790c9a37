"""Grading in a child process, so that no answer can crash, stall or fill the memory of a run.

*Wrong* is whatever an answer causes: an answer that makes the verifier raise, hang or die, while the verifier manages
the known-good answer to the same problem, scores 0.  *Unknown* is the verifier's own fault: it says so, the known-good
answer fails too, or the child cannot be kept alive.  Where a problem has no known-good answer, the verifier works if it
manages an empty text, a number, or anything else in the same batch that is of the same task (a mixture has several).

The child is limited and confined (`confine.py`): time, memory, processes, size of files, no network, no environment.
What the kernel here does not allow is missing from `Grader.isolation`, and a run's record says so.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rung.core.config import decode, encode
from rung.core.errors import ConfigError, TaskError
from rung.core.words import Answer, Grade, Reply, unknown
from rung.tasks.confine import described
from rung.tasks.load import absolute

START_SECONDS = 120.0  # loading a task may import much
KEPT = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL")  # of the environment
STAND_INS = ("", "0")  # where no answer is known good: a verifier that calls float(text) manages the second
END_SECONDS = 5.0  # for the keeper to end what the verifier started
TAIL = 2000  # bytes of the child's stderr that a message may quote


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a verifier may use, with all that it starts.

    seconds:      by the clock, for one answer
    cpu_seconds:  of computing, for one answer
    memory_bytes: address space of a process
    file_bytes:   largest file, and size of the temporary folder
    processes:    processes and threads at a time
    network:      it may use the network (a judge behind an address)
    writable:     it may write files outside its temporary folder, where the user may
    """

    seconds: float = 5.0
    cpu_seconds: int = 10
    memory_bytes: int = 4 << 30
    file_bytes: int = 64 << 20
    processes: int = 64
    network: bool = False
    writable: bool = False

    def __post_init__(self) -> None:
        for name in ("seconds", "cpu_seconds", "memory_bytes", "file_bytes", "processes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"grading.{name} must be positive, and is {getattr(self, name)}")


class Grader:
    """A task's verifier in a child process, started at once and again whenever it was lost.

    Raises TaskError where the task cannot be loaded.  Close it, or use it in a `with`.
    """

    def __init__(self, name: str, options: Mapping[str, Any], limits: Limits | None = None):
        self._limits = limits or Limits()
        name, options = absolute(name, options)
        self._setup = {"task": name, "options": dict(options), "folder": str(Path.cwd())}
        self._broken = ""  # why the child could not be started again
        self._child = _Child(self._setup, self._limits)
        self.isolation = described(self._child.facts)
        self.lacking = lacking(self._child.facts, self._limits)

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """One grade per answer, each taken as final."""
        judged = self.judge([replace(answer, final=True) for answer in answers])
        return [grade for grade in judged if isinstance(grade, Grade)]

    def judge(self, answers: Sequence[Answer]) -> list[Grade | Reply]:
        """One grade per answer, or the environment's reply to one that is not final.

        An answer that fails the verifier, or the environment, is judged by the problem's known-good answer.
        """
        self._broken = ""
        hopeless: dict[str, str] = {}
        outcomes = self._outcomes(answers)
        works = {a.problem.task for a, outcome in zip(answers, outcomes, strict=True) if _managed(outcome)}
        return [
            self._judge(answer, outcome, hopeless, works) for answer, outcome in zip(answers, outcomes, strict=True)
        ]

    def close(self) -> None:
        self._child.kill()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _outcomes(self, answers: Sequence[Answer]) -> list["Grade | Reply | _Failure"]:
        """A judgement or a failure per answer; the child is started anew after each that it did not survive."""
        outcomes: list[Grade | Reply | _Failure] = []
        while len(outcomes) < len(answers) and self._ready():
            rest = answers[len(outcomes) :]
            try:
                self._child.send({"answers": [encode(answer) for answer in rest]})
                for _ in rest:
                    outcomes.append(self._child.result(self._limits.seconds))
                    if not self._child.alive:
                        break
            except BaseException:  # Ctrl-C: its remaining grades must not be taken for those of the next batch
                self._child.kill()
                raise
        return outcomes + [unknown(f"the verifier is lost: {self._broken}")] * (len(answers) - len(outcomes))

    def _ready(self) -> bool:
        """Whether there is a child; a lost one is replaced, unless that has just failed."""
        if not self._child.alive and not self._broken:
            try:
                self._child = _Child(self._setup, self._limits)
            except (TaskError, OSError) as error:
                self._broken = str(error)
        return not self._broken

    def _living(self) -> "_Child | None":
        return self._child if self._child.alive else None

    def _judge(
        self, answer: Answer, outcome: "Grade | Reply | _Failure", hopeless: dict[str, str], works: Set[str]
    ) -> Grade | Reply:
        """What a failure means.

        hopeless: problems whose known-good answer fails, and how; filled as it goes (without one, a whole task is one)
        works:    tasks of which some answer of the batch was judged
        """
        if isinstance(outcome, _Failure) and outcome.child is not None and outcome.child is not self._living():
            (outcome,) = self._outcomes([answer])  # perhaps an accident, or an earlier answer's doing: once more
        known_good = answer.problem.answer
        problem = f"of {answer.problem.task}" if known_good is None else answer.problem.id
        for attempt in range(2):
            if not isinstance(outcome, _Failure):
                return outcome
            if problem in hopeless:
                break
            survived = self._child.alive
            control = self._control(answer)
            if _managed(control):
                return Grade(score=0.0, error=outcome.reason)
            assert not isinstance(control, Reply)
            if not survived or attempt:
                hopeless[problem] = control.error if isinstance(control, Grade) else control.reason
            else:  # an earlier answer may have left the child in ruins: once more, in a new one
                self._child.kill()
                (outcome,) = self._outcomes([answer])
        assert isinstance(outcome, _Failure)
        if known_good is None and answer.problem.task in works and not self._broken:
            return Grade(score=0.0, error=outcome.reason)
        kind = "the known-good answer to the same problem fails too"
        if known_good is None:
            kind = "with no known-good answer to try, every other answer, an empty one and '0' fail too"
        return unknown(f"{outcome.reason}; {kind}: {hopeless[problem]}")

    def _control(self, answer: Answer) -> "Grade | Reply | _Failure":
        """What becomes of the known-good answer to a problem; without one, of the first stand-in that is judged.

        It is given at once: what the model said in earlier turns may be what fails the verifier.
        """
        known_good = answer.problem.answer
        for text in STAND_INS if known_good is None else (known_good,):
            (outcome,) = self._outcomes([replace(answer, text=text, stop="eos", earlier=())])
            if _managed(outcome):
                break
        return outcome


class UnknownWatch:
    """Stops a run whose verifier fails: more than `share` of the grades of the last `window` groups are unknown.

    `state` and `restore` carry it over a resume, as plain values.
    """

    def __init__(self, share: float = 0.05, window: int = 50):
        self._share, self._window = share, window
        self._groups: deque[tuple[int, int]] = deque(maxlen=window)  # (unknown grades, all grades)
        self.dropped = 0

    def add(self, grades: Sequence[Grade]) -> bool:
        """Count a group; False, and one more `dropped`, where fewer than two of its grades are known.

        Raises TaskError as soon as the share is passed, whatever the rest of the window would bring.
        """
        missing = [grade for grade in grades if not grade.known]
        self._groups.append((len(missing), len(grades)))
        bad, seen = (sum(column) for column in zip(*self._groups, strict=True))
        if bad > self._share * max(seen, self._window * len(grades)):
            raise TaskError(
                f"the verifier failed on {bad} of the last {seen} answers, which is more than {self._share:.0%} of "
                f"{self._window} groups"
                + (f" ({missing[-1].error})" if missing else "")
                + ". Mend the task, then resume the run"
            )
        kept = len(grades) - len(missing) >= min(2, len(grades))
        self.dropped += not kept
        return kept

    def state(self) -> dict[str, Any]:
        return {"groups": [list(group) for group in self._groups], "dropped": self.dropped}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._groups = deque((tuple(group) for group in state["groups"]), maxlen=self._window)
        self.dropped = state["dropped"]


@dataclass(frozen=True)
class _Failure:
    """A verifier that gave no grade, and the child that failed; None after a time-out: nobody waits for that twice."""

    reason: str
    child: "_Child | None" = None


def _managed(outcome: "Grade | Reply | _Failure") -> bool:
    """Whether the task did its work on an answer, whatever it thinks of it."""
    return isinstance(outcome, Reply) or (isinstance(outcome, Grade) and outcome.known)


class _Child:
    """One worker process, alive until it fails to answer.  Raises TaskError where it does not get ready."""

    def __init__(self, setup: Mapping[str, Any], limits: Limits):
        self._buffer = self._tail = b""
        self._folder = tempfile.mkdtemp(prefix="rung-grading-")
        self._process = subprocess.Popen(
            # -P: a queue.py in this folder is not the library's
            [sys.executable, "-P", "-m", "rung.tasks.worker", json.dumps(encode(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(self._folder),
            start_new_session=True,  # Ctrl-C is the parent's; and what the verifier starts dies with it
        )
        self.alive = True
        self.send(setup)
        ready = self._receive(START_SECONDS)
        if isinstance(ready, _Failure) or "error" in ready:
            self.kill()
            raise TaskError(ready.reason if isinstance(ready, _Failure) else ready["error"])
        self.facts: dict[str, str] = ready["ready"]

    def send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # a dead child is noticed when its answer is awaited
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def result(self, seconds: float) -> Grade | Reply | _Failure:
        """The next grade or reply, or why there is none."""
        message = self._receive(seconds)
        if isinstance(message, _Failure):
            self.kill()
            return message
        if "reply" in message:
            return decode(Reply, message["reply"])
        return decode(Grade, message["grade"]) if "grade" in message else _Failure(message["error"], self)

    def kill(self) -> None:
        """End the child and all that it started: letting go of its stdin tells its keeper to."""
        self.alive = False
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _receive(self, seconds: float) -> Any:
        """The next message, or a _Failure; what the child prints meanwhile is drained."""
        assert self._process.stdout
        assert self._process.stderr
        out, err = self._process.stdout.fileno(), self._process.stderr.fileno()
        watched, deadline = [out, err], time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            ready = select.select(watched, [], [], left)[0] if left > 0 else []
            if not ready:
                return _Failure(f"the verifier took more than {seconds:g} seconds")
            if err in ready:
                printed = os.read(err, 1 << 16)
                self._tail = (self._tail + printed)[-TAIL:]
                watched = watched if printed else [out]
            if out in ready:
                data = os.read(out, 1 << 16)
                if not data:
                    return self._epitaph()
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _epitaph(self) -> _Failure:
        code = self._process.wait()
        cause = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        last = self._tail.decode(errors="replace").strip().rpartition("\n")[2]
        reason = f"the verifier's process ended {cause}" + (f", after {last!r}" if last else "")
        return _Failure(reason, None if code == -signal.SIGXCPU else self)  # SIGXCPU: its computing time was up


def isolation(limits: Limits) -> str:
    """How a grading child is confined here, on one line: a property of this machine, whatever the task."""
    child = _Child({"task": "arithmetic", "options": {}, "folder": str(Path.cwd())}, limits)
    child.kill()
    return described(child.facts)


def lacking(facts: Mapping[str, str], limits: Limits) -> str:
    """What was asked for and the kernel here refuses, as a sentence; "" where nothing is missing."""
    asked = {"processes": f"at most {limits.processes}", "network": "open" if limits.network else "none"}
    asked["files"] = "writable" if limits.writable else "read-only"
    missing = [f"{name} {facts[name]}" for name, wanted in asked.items() if facts[name] != wanted]
    return (
        f"the kernel or container here does not let the grading child be confined as asked ({', '.join(missing)}): "
        "a verifier that runs a model's text as a program needs a container around the whole run"
        if missing
        else ""
    )


def _environment(folder: str) -> dict[str, str]:
    """What Python needs to find itself, and nothing that tells of the user.

    One hash seed for all children: what a verifier makes of a set of strings does not change from one to the next.
    """
    found = {name: os.environ[name] for name in KEPT if name in os.environ}
    if "PYTHONPATH" in found:
        places = found["PYTHONPATH"].split(os.pathsep)
        found["PYTHONPATH"] = os.pathsep.join(str(Path(place).absolute()) for place in places if place)
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    return {**found, **threads, "PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"}
