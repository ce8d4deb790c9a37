"""`rung eval MODEL TASK`"""

from dataclasses import dataclass
from typing import Literal

from rung.cli import options
from rung.cli.display import Display
from rung.cli.options import Option
from rung.core.errors import ConfigError
from rung.tasks.load import task_parameters
from rung.tasks.sandbox import Limits
from rung.train.config import TaskSpec

COMMAND = "rung eval"
TASK_OPTIONS = ("task", "options")
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
    grade_seconds: most seconds by the clock that the verifier may take for one answer
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
    grade_seconds: float = 5.0
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "cpu"
    foreign: bool = False


def help(args: list[str]) -> str:
    """With a model and a task as first words, the task's options too."""
    general = {"options": options.options_of(Eval)}
    if len(args) < 2 or args[1].startswith("-"):
        more = f"`{COMMAND} MODEL TASK --help` lists the task's own options too."
        return options.help_text(COMMAND, f"{options.summary_of(Eval)} {more}", general)
    return options.help_text(COMMAND, options.summary_of(Eval), {**general, f"task {args[1]}": task_options(args[1])})


def run(args: list[str]) -> None:
    if len(args) < 2 or args[0].startswith("--") or args[1].startswith("--"):
        raise ConfigError(f"{COMMAND} needs MODEL and TASK as its first words. See `{COMMAND} --help`.")
    values = options.parse(args, [*options.options_of(Eval), *task_options(args[1])], command=COMMAND)
    asked = Eval(**{path[0]: value for path, value in values.items() if len(path) == 1})
    task = TaskSpec(name=asked.task, options={path[2]: value for path, value in values.items() if len(path) == 3})
    import rung

    with Display() as display:
        model = rung.load(asked.model, dtype=asked.dtype, device=asked.device, foreign=asked.foreign, listener=display)
        found = rung.evaluate(
            model,
            task,
            problems=asked.problems,
            split=asked.split,
            max_tokens=asked.max_tokens,
            max_turns=asked.max_turns,
            max_length=asked.max_length,
            temperature=asked.temperature,
            seed=asked.seed,
            limits=Limits(seconds=asked.grade_seconds),
            listener=display,
        )
    unknown = f", {found.unknown} more of unknown grade" if found.unknown else ""
    interval = f"95 % interval {found.low:.1%} to {found.high:.1%}"
    print(f"accuracy {found.accuracy:.1%}  ({interval}, {found.n} problems{unknown})")


def task_options(name: str) -> list[Option]:
    """The options of a task, spelt as in `rung train`; those that no word can stand for are left out."""
    found = []
    for parameter in task_parameters(name):
        has_default = parameter.default is not parameter.empty
        kinds = (parameter.annotation, type(parameter.default))  # `bonus: float = 1` takes 0.5
        kind = next((kind for kind in kinds if kind in WORD_KINDS), None)
        if kind is not None:
            default = parameter.default if has_default else None
            found.append(Option(path=(*TASK_OPTIONS, parameter.name), kind=kind, default=default))
    return found
