"""The grading child: `python -m rung.tasks.worker LIMITS`.  It runs a verifier on one answer at a time; it may die.

In, on stdin, JSON lines: first {"task", "options", "folder"}, then {"answers": [...]}.
Out, on what was stdout: {"ready": facts} or {"error": ...}; then a line per answer in order: {"grade"}, {"error"}, or
{"reply"} where the answer is not final and the task's environment goes on.
What the verifier itself prints goes to stderr.  The process ends with its parent: stdin closes.

A task is loaded where the parent stands, so that it finds its files by relative names; no answer has been seen then.
"""

import json
import math
import os
import queue
import reprlib
import resource
import sys
import threading
from dataclasses import replace
from io import FileIO
from typing import Any, get_args

from rung.core.config import decode, encode
from rung.core.errors import RungError, TaskError
from rung.core.words import Answer, Grade, Message, Reply, Role
from rung.tasks.base import Task, where
from rung.tasks.confine import confine
from rung.tasks.load import load_task


def main() -> None:
    """Serve one parent until it closes stdin."""
    limits, folder = json.loads(sys.argv[1]), os.environ["HOME"]
    facts = confine(limits, folder)
    requests, results = _take_pipes()
    setup = requests.get()
    os.chdir(setup["folder"])
    try:
        task = load_task(setup["task"], setup["options"])
    except RungError as error:
        _send(results, {"error": str(error)})
        return
    os.chdir(folder)
    serving = os.getpid()
    _send(results, {"ready": facts})
    while True:
        for answer in requests.get()["answers"]:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime + limits["cpu_seconds"]))
            _send(results, _judge(task, decode(Answer, answer), setup["task"]), sender=serving)


def _judge(task: Task, answer: Answer, name: str) -> dict[str, Any]:
    try:
        if not answer.final and (said := task.reply(answer.problem, list(answer.messages))) is not None:
            return {"reply": encode(_sound_reply(said))}
        return {"grade": encode(_sound(task.grade([answer])))}
    except RungError as error:
        return {"error": f"the task {name}: {error}"}
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # whatever the verifier does, the parent judges it
        return {"error": where(error, name.rpartition(":")[0])}


def _sound(grades: Any) -> Grade:
    """The grade of the one answer; True and 1 count as 1.0.  Raises TaskError for what is no grade."""
    if not isinstance(grades, list | tuple) or len(grades) != 1 or not isinstance(grades[0], Grade):
        raise TaskError(f"grade must return a list of one Grade per answer, and returned {reprlib.repr(grades)}")
    (grade,) = grades
    if grade.right not in (True, False):
        raise TaskError(f"a grade is right or not (True or False), and is {reprlib.repr(grade.right)}")
    parts = {name: _number(value) for name, value in grade.parts.items()}
    score = None if grade.score is None else _number(grade.score)
    return replace(grade, score=score, right=bool(grade.right), parts=parts, error=str(grade.error))


def _sound_reply(said: Any) -> Reply:
    """The environment's turn.  Raises TaskError for what is none."""
    if not isinstance(said, list | tuple) or not all(isinstance(message, Message) for message in said):
        raise TaskError(f"reply must return None or a list of Messages, and returned {reprlib.repr(said)}")
    for message in said:
        if message.role not in get_args(Role) or not isinstance(message.content, str):
            raise TaskError(f"a Message has a role ({', '.join(get_args(Role))}) and a text, and is {message!r:.200}")
        message.content.encode()  # unpaired surrogates are no text
    if not said or said[0].role == "assistant":
        raise TaskError("reply must return None, which ends the episode, or begin with a turn that is not the model's")
    return Reply(messages=tuple(said))


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise TaskError(f"a score must be a finite number, and is {reprlib.repr(value)}")
    return number


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


def _send(results: FileIO, message: dict[str, Any], sender: int = 0) -> None:
    """Write a line; but what a verifier forked, and did not end, must not answer in its parent's place."""
    if sender and os.getpid() != sender:
        os._exit(1)
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[results.write(data) :]


def _limit(kind: int, amount: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


if __name__ == "__main__":
    main()
