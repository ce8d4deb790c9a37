"""The grading child: `python -m rung.tasks.worker`.  It runs a verifier, one answer at a time, and may die of it.

In, on stdin, JSON lines: first {"task", "options", "cpu_seconds", "memory_bytes"}, then {"answers": [...]}.
Out, on what was stdout: {"ready": true} or {"error": ...}; then a line per answer in order, {"grade"} or {"error"}.
What the verifier itself prints goes to stderr.  The process ends with its parent: stdin closes.
"""

import json
import math
import os
import queue
import resource
import threading
from io import FileIO
from typing import Any

from rung.core.config import decode, encode
from rung.core.errors import RungError
from rung.core.words import Answer
from rung.tasks.base import Task
from rung.tasks.load import load_task, where


def main() -> None:
    """Serve one parent until it closes stdin."""
    requests, results = _take_pipes()
    setup = requests.get()
    _limit(resource.RLIMIT_AS, setup["memory_bytes"])
    try:
        task = load_task(setup["task"], setup["options"])
    except RungError as error:
        _send(results, {"error": str(error)})
        return
    _send(results, {"ready": True})
    while True:
        for answer in requests.get()["answers"]:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime + setup["cpu_seconds"]))
            _send(results, _grade(task, decode(Answer, answer), setup["task"]))


def _grade(task: Task, answer: Answer, name: str) -> dict[str, Any]:
    try:
        (grade,) = task.grade([answer])
        return {"grade": encode(grade)}
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # whatever the verifier does, the parent judges it
        return {"error": where(error, name.rpartition(":")[0])}


def _take_pipes() -> tuple[queue.Queue[Any], FileIO]:
    """Requests and the pipe for results, out of reach of a verifier that prints or reads."""
    requests: queue.Queue[Any] = queue.Queue()
    source, results = os.fdopen(os.dup(0), "rb"), FileIO(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)

    def listen() -> None:
        for line in source:
            requests.put(json.loads(line))
        os._exit(0)  # the parent is gone, or has closed us

    threading.Thread(target=listen, daemon=True).start()
    return requests, results


def _send(results: FileIO, message: dict[str, Any]) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[results.write(data) :]


def _limit(kind: int, amount: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


if __name__ == "__main__":
    main()
