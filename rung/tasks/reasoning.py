"""Every data set of reasoning-gym as a task: `reasoning-gym:chain_sum` and about a hundred others (extra `tasks`).

A problem is a function of its number alone, in every process.  Three things stand in the way and are put right: some
generators draw from Python's or NumPy's global generator (which is set for each problem, and put back), some iterate
over sets of strings (their order follows PYTHONHASHSEED: those are made in a process that has it fixed), and some make
all problems at once (those are fewer by default).

Answers are judged as `reasoning_scorers.py` says.
"""

import dataclasses
import inspect
import json
import os
import random
import re
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache
from typing import Any

from rung.core.config import decode, encode
from rung.core.errors import ConfigError, TaskError, nearest
from rung.core.keys import derive_key
from rung.core.words import Answer, Grade, Message, Problem
from rung.tasks import reasoning_scorers as scorers
from rung.tasks.base import problem_id
from rung.tasks.extract import LONGEST_TEXT, RULES, Allowed

PREFIX = "reasoning-gym:"
SIZE = 100_000
MADE_AT_ONCE = {"acre": 500, "word_ladder": 500}  # by their constructors, in time proportional to their number
ORDER_OF_SETS = (
    *("codeio", "isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication", "ransom_note"),
)
GLOBAL_GENERATORS = ("list_functions", "pool_matrix")
HASH_SEED = "0"
KEPT = 256  # problems in memory: a group's answers come one after another
OPEN_FORMS = "Integral("  # in a known-good answer that is none
OWN = {
    "extract": "",
    "system": "",
    "suffix": "",
    "opening": "",
    "partial": False,
    "must_end": True,
}
NUMBER = Allowed(64, re.compile(r"[0-9+\-.,/eE ]*"))
FORMULA = Allowed(1000, re.compile(r"[0-9A-Za-z_+\-*/^(). \n]*"))
TEXT = Allowed(4096, re.compile(r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]*"))
FORMULAS = (*scorers.RUN_AS_CODE[4:],)


def named(name: str) -> Callable[..., "Reasoning"]:
    """What makes the task of a data set, with its options as a signature.  Raises TaskError for an unknown one."""
    configs = _registry()
    if not name:
        raise TaskError("reasoning-gym is many data sets: name one, as in reasoning-gym:chain_sum")
    if name not in configs:
        raise TaskError(f"reasoning-gym has no data set {name!r}. {nearest(name, configs)}")
    scorers.scorer_of(name)
    defaults = _defaults(name)

    def make(**options: Any) -> Reasoning:
        return Reasoning(name, {**defaults, **options})

    make.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=type(value))
            for key, value in defaults.items()
        ]
    )
    return make


class Reasoning:
    """One data set.

    extract:  how the answer is found in a text, a rule of `extract.py`; "" is `number` where answers are numbers, else
              `whole`
    system:   a system message, "" for none
    suffix:   what is added to every question
    opening:  how every answer begins, written by the task and not by the model; "" for nothing
    partial:  pay what the data set's own scorer pays for an answer that is not right (some pay 0.01 to 0.05 for every
              text); right is still only what scores 1
    must_end: an answer that was cut off is wrong

    All others are the data set's own, lists being written as JSON in a string.
    """

    def __init__(self, name: str, options: Mapping[str, Any]):
        self.name = name
        self._options = dict(options)
        own = {key: _typed(name, key, default, options[key]) for key, default in OWN.items()}
        self.system, self.suffix, self.opening = own["system"], own["suffix"], own["opening"]
        self.partial, self.must_end = own["partial"], own["must_end"]
        extract = own["extract"] or ("number" if name in scorers.NUMBERS else "whole")
        if extract not in RULES:
            raise TaskError(f"extract of {PREFIX}{name}: {nearest(extract, RULES)}")
        self.rule, self.score = RULES[extract], scorers.scorer_of(name)
        self.allowed = NUMBER if name in scorers.NUMBERS else FORMULA if name in FORMULAS else TEXT
        self._data = _made(name, {key: value for key, value in options.items() if key not in OWN})
        self._entry = lru_cache(KEPT)(self._generate)
        self._elsewhere: subprocess.Popen[str] | None = None

    def __len__(self) -> int:
        return len(self._data)

    def problem(self, index: int) -> Problem:
        if self.name in ORDER_OF_SETS and os.environ.get("PYTHONHASHSEED") != HASH_SEED:
            return self._ask_elsewhere(index)
        entry = self._entry(index)
        question = entry["question"] + (f"\n{self.suffix}" if self.suffix else "")
        messages = (
            Message("system", self.system),
            Message("user", question),
            Message("assistant", self.opening),
        )
        known = entry["answer"]
        return Problem(
            id=problem_id(f"{PREFIX}{self.name} {_content(entry)}"),
            messages=tuple(message for message in messages if message.content),
            answer=None if known is None or OPEN_FORMS in str(known) else self.rule.around(str(known)),
            task=PREFIX + self.name,
            facts={"index": index},
        )

    def reply(self, problem: Problem, messages: Sequence[Message]) -> list[Message] | None:
        return None

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        return [self._grade(answer) for answer in answers]

    def _grade(self, answer: Answer) -> Grade:
        index = int(answer.problem.facts["index"])
        if self.problem(index).id != answer.problem.id:
            raise TaskError(f"problem {index} of {PREFIX}{self.name} is another one in this process")
        found = self.rule.out(answer.text) if len(answer.text) <= LONGEST_TEXT else None
        if found is None or not self.allowed(found):
            return Grade(score=0.0, parts={"found": float(found is not None), "allowed": 0.0})
        entry = self._entry(index)
        score = self.score(self._data, found, entry)
        ended = not self.must_end or answer.stop != "length"
        right = score == 1.0 and ended
        paid = score if self.partial and score < 1.0 else float(right)
        return Grade(score=paid, right=right, parts={"equal": float(score == 1.0), "ended": float(ended)})

    def _generate(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise TaskError(f"{PREFIX}{self.name} has problems 0 to {len(self) - 1}, and {index} was asked for")
        if self.name not in GLOBAL_GENERATORS:
            return self._data[index]
        with _global_generators(derive_key(PREFIX, self.name, index)):
            return self._data[index]

    def _ask_elsewhere(self, index: int) -> Problem:
        """From a process in which sets of strings have an order that is always the same."""
        if self._elsewhere is None:
            self._elsewhere = subprocess.Popen(
                [sys.executable, "-P", "-m", "rung.tasks.reasoning", self.name, json.dumps(self._options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONHASHSEED": HASH_SEED},
                text=True,
                start_new_session=True,  # Ctrl-C is the parent's
            )
            weakref.finalize(self, _end, self._elsewhere)
        assert self._elsewhere.stdin
        assert self._elsewhere.stdout
        self._elsewhere.stdin.write(f"{index}\n")
        self._elsewhere.stdin.flush()
        line = self._elsewhere.stdout.readline()
        if not line:
            raise TaskError(f"the process that makes the problems of {PREFIX}{self.name} ended")
        return decode(Problem, json.loads(line))


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe
        pipe.close()


def _registry() -> dict[str, type]:
    """Data set -> its configuration class.  Raises TaskError where reasoning-gym is not installed."""
    try:
        import reasoning_gym  # noqa: F401 (it fills the registry)
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise TaskError(f"{PREFIX}... needs the package reasoning-gym: pip install 'rung[tasks]' ({error})") from error
    return {name: config for name, (_, config) in DATASETS.items()}


def _defaults(name: str) -> dict[str, Any]:
    """Every option with its default: a number, a word, or JSON; what is none of them cannot be set."""
    config = _registry()[name]()
    found = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    found |= {"seed": 0, "size": MADE_AT_ONCE.get(name, SIZE)}
    plain = {key: _plain(value) for key, value in found.items()}
    return {**{key: value for key, value in plain.items() if value is not None}, **OWN}


def _typed(name: str, key: str, default: Any, value: Any) -> Any:
    """The value, of the kind of the default.  Raises TaskError."""
    try:
        return decode(type(default), value, key)
    except ConfigError as error:
        raise TaskError(f"{PREFIX}{name}: {error}") from error


def _plain(value: Any) -> int | float | str | None:
    value = value.value if isinstance(value, Enum) else value
    try:
        return value if isinstance(value, int | float | str) else json.dumps(value)
    except TypeError:
        return None


def _made(name: str, options: Mapping[str, Any]) -> Any:
    """The data set.  Raises TaskError for a value of the wrong kind, or one that it refuses."""
    import reasoning_gym

    defaults, config = _defaults(name), _registry()[name]()
    values = {}
    for key, value in options.items():
        value = _typed(name, key, defaults[key], value)
        own = getattr(config, key)
        if key in ("seed", "size") or (value != defaults[key] and isinstance(own, int | float | str)):
            values[key] = _chosen(f"{PREFIX}{name}: {key}", type(own), value) if isinstance(own, Enum) else value
        elif value != defaults[key]:
            values[key] = _from_json(f"{PREFIX}{name}: {key}", value, own)
    try:
        with _global_generators(derive_key(PREFIX, name)):
            return reasoning_gym.create_dataset(name, **values)
    except Exception as error:  # asserts, for the most part
        raise TaskError(f"{PREFIX}{name} refuses its options: {error}") from error


def _from_json(what: str, value: str, default: Any) -> Any:
    """A list or table out of its JSON, of the same kind as the default, and as its members."""
    try:
        found = json.loads(value)
    except ValueError as error:
        raise TaskError(f"{what} is written as JSON, and is {value!r}: {error}") from error
    if isinstance(default, list | tuple) and isinstance(found, list):
        kind: Any = type(default[0]) if default else object
        found = [_chosen(what, kind, item) for item in found] if issubclass(kind, Enum) else found
        return tuple(found) if isinstance(default, tuple) else found
    return found


def _chosen(what: str, choices: type[Enum], value: Any) -> Enum:
    try:
        return choices(value)
    except ValueError:
        raise TaskError(f"{what}: {nearest(str(value), [str(choice.value) for choice in choices])}") from None


def _content(entry: Mapping[str, Any]) -> str:
    """What must not leak from one part to another: the question, but a sum or product without its order."""
    expression = entry["metadata"].get("expression") if isinstance(entry["metadata"], Mapping) else None
    kinds = {"chain_sum": r"[+-]?\s*[0-9]+", "products": r"[0-9]+"}
    pattern = kinds.get(entry["metadata"].get("source_dataset", ""))
    if not expression or pattern is None:
        return entry["question"]
    terms = Counter("".join(term.split()).lstrip("+") for term in re.findall(pattern, expression))
    return str(sorted(terms.items()))


@contextmanager
def _global_generators(key: int) -> Iterator[None]:
    """Python's and NumPy's set to a key, and then put back as they were."""
    import numpy

    kept, kept_numpy = random.getstate(), numpy.random.get_state()
    random.setstate(random.Random(key).getstate())
    numpy.random.set_state(numpy.random.RandomState(key % 2**32).get_state())
    try:
        yield
    finally:
        random.setstate(kept)
        numpy.random.set_state(kept_numpy)


def _serve(name: str, options: Mapping[str, Any]) -> None:
    """Problems for `_ask_elsewhere`: a number a line in, a problem a line out."""
    task = Reasoning(name, options)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(encode(task.problem(int(line)))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]))
