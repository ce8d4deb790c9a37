"""`rung eval MODEL TASK`"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rung.cli import options
from rung.cli.display import Display
from rung.cli.options import Option
from rung.core.errors import ConfigError
from rung.tasks.load import task_parameters
from rung.tasks.sandbox import Limits
from rung.train.config import TaskSpec

COMMAND = "rung eval"
TASK_OPTIONS = ("task", "options")
PART = re.compile(r"--task\.options\.(.+\.task)")
WORD_KINDS = (int, float, str, bool)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the share of a task's problems that a model solves, with its 95 % Wilson interval.

    model: a name (`rung models`), a Hugging Face folder, a .gguf file, or an id of the Hub (org/name)
    task: a built-in name, reasoning-gym:name, module:name or file.py:name
    problems: how many are asked
    split: train, validation or held_out
    max_tokens: most tokens of an answer
    max_turns: most answers of an episode, for tasks that reply
    max_length: most positions of an episode, prompt included; 0: as many as the model has
    temperature: 0 always takes the likeliest token
    seed: chooses the problems
    grading: what the verifier may use: seconds of one answer, memory, processes, network
    dtype: auto is bf16 where the machine multiplies it fast, else fp32
    device: cpu, cuda, or cuda:1 for the second of several GPUs
    foreign: through transformers although Rung has the model's family
    """

    model: str
    task: str
    problems: int = 500
    split: Literal["train", "validation", "held_out"] = "held_out"
    max_tokens: int = 16
    max_turns: int = 1
    max_length: int = 0
    temperature: float = 0.0
    seed: int = 0
    grading: Limits = field(default_factory=Limits)
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "cpu"
    foreign: bool = False


def help(args: list[str]) -> str:
    """With a model and a task as first words, the task's options too."""
    found = options.options_of(Eval)
    groups = {name: [o for o in found if (len(o.path) > 1) == (name == "grading")] for name in ("options", "grading")}
    if len(args) < 2 or args[1].startswith("-"):
        more = f"`{COMMAND} MODEL TASK --help` lists the task's own options too."
        return options.help_text(COMMAND, f"{options.summary_of(Eval)} {more}", groups)
    groups[f"task {args[1]}"] = task_options(args[1], typed_parts(args))
    return options.help_text(COMMAND, options.summary_of(Eval), groups)


def run(args: list[str]) -> None:
    if len(args) < 2 or args[0].startswith("--") or args[1].startswith("--"):
        raise ConfigError(f"{COMMAND} needs MODEL and TASK as its first words. See `{COMMAND} --help`.")
    known = [*options.options_of(Eval), *task_options(args[1], typed_parts(args))]
    values = options.parse(args, known, command=COMMAND)
    asked = Eval(**{path[0]: value for path, value in values.items() if len(path) == 1})
    limits = options.changed(asked.grading, {path[1:]: v for path, v in values.items() if path[0] == "grading"})
    task = TaskSpec(name=asked.task, options={path[2]: value for path, value in values.items() if len(path) == 3})
    names = ("problems", "split", "seed", "max_tokens", "temperature", "max_turns", "max_length")
    chosen = {name: getattr(asked, name) for name in names}
    import rung
    from rung.train.evaluate import asked_of

    asked_of(task, **chosen)  # what is wrong is said before a model is read
    with Display() as display:
        model = rung.load(asked.model, dtype=asked.dtype, device=asked.device, foreign=asked.foreign, listener=display)
        found = rung.evaluate(model, task, **chosen, limits=limits, listener=display)
    unknown = f", {found.unknown} more of unknown grade" if found.unknown else ""
    interval = f"95 % interval {found.low:.1%} to {found.high:.1%}"
    print(f"accuracy {found.accuracy:.1%}  ({interval}, {found.n} problems{unknown})")


def task_options(name: str, parts: Mapping[str, Any]) -> list[Option]:
    """The options of a task, spelt as in `rung train`; those that no word can stand for are left out.

    parts: of a mixture, whose parts' options stand behind their names: its options as far as they name tasks
    """
    found = []
    for key, task in parts.items() if name == "mixture" else ():
        part, _, last = key.partition(".")
        if last == "task" and isinstance(task, str):
            rest = {key.removeprefix(f"{part}."): value for key, value in parts.items() if key.startswith(f"{part}.")}
            own = [Option(path=("task",), kind=str), Option(path=("weight",), kind=float, default=1.0)]
            own += task_options(task, rest)
            found += [replace(option, path=(*TASK_OPTIONS, f"{part}.{option.path[-1]}")) for option in own]
    for parameter in task_parameters(name):
        has_default = parameter.default is not parameter.empty
        kinds = (parameter.annotation, type(parameter.default))  # `bonus: float = 1` takes 0.5
        kind = next((kind for kind in kinds if kind in WORD_KINDS), None)
        if kind is not None:
            default = parameter.default if has_default else None
            found.append(Option(path=(*TASK_OPTIONS, parameter.name), kind=kind, default=default))
    return found


def typed_parts(args: Sequence[str]) -> dict[str, str]:
    """The tasks that were typed as parts of a mixture: "sums.task" -> "arithmetic"."""
    found = {}
    for word, after in zip(args, [*args[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if part := PART.fullmatch(flag):
            found[part[1].replace("-", "_")] = value if equals else after
    return found
