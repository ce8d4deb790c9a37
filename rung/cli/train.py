"""`rung train RECIPE`"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from rung.cli import jobs, options
from rung.cli.eval import task_options, typed_parts
from rung.cli.options import Option
from rung.core import config
from rung.core.errors import ConfigError, nearest
from rung.core.progress import Listener
from rung.report.load import RUNS, read_run
from rung.report.visible import one_line
from rung.train.config import METHODS, GroupRL, TaskSpec

COMMAND = "rung train"
METHOD, TASK_NAME = ("method",), ("task", "name")
TASK_OF = {"data": "task", "reward": "task"}  # words that stand for a part of the recipe


@dataclass(frozen=True, kw_only=True)
class Train:
    """Teach a model a task by reinforcement learning: measure it, train it, measure it again, write a report.

    recipe: a built-in name, file.py:function, module:function, or a .toml or .json file that --print-config wrote
    folder: where the run is kept (without it: runs/NAME)
    data: a file of JSON lines with questions, in place of the recipe's task; math-verify judges answers, or --reward
    reward: FILE.py:NAME or FILE.py:NAME=WEIGHT, a function that rewards answers to --data in place of math-verify,
        f(prompts, completions, **columns) as in trl, or f(problem, text); may be given again
    or_resume: when the folder holds this very run already, go on with it; when it is finished, only tell its result
    print_config: print the whole configuration, which given as RECIPE repeats the run, and stop
    dry_run: print how much memory and time it would take, and stop
    tensorboard: mirror the metrics to FOLDER/tensorboard
    """

    recipe: str
    folder: str = ""
    data: str = ""
    reward: tuple[str, ...] = ()
    or_resume: bool = False
    print_config: bool = False
    dry_run: bool = False
    tensorboard: bool = False


def help(args: list[str]) -> str:
    """Without a recipe the general options, with one its own too, each with the recipe's value."""
    general = {"options": options.options_of(Train)}
    if not args or args[0].startswith("-"):
        known = ", ".join(recipes())
        more = f"Built-in recipes: {known}. `{COMMAND} RECIPE --help` lists what can be changed in a recipe."
        return options.help_text(COMMAND, f"{options.summary_of(Train)} {more}", general)
    recipe = load_recipe(args[0])
    groups = {**general, **_groups(recipe_options(recipe))}
    return options.help_text(COMMAND, options.summary_of(Train), groups)


def run(args: list[str]) -> None:
    asked, recipe = read(args)
    folder = Path(asked.folder or Path(RUNS) / recipe.name)
    if asked.print_config:
        print(config.dumps_json(recipe), end="")
        return
    if asked.or_resume and args[0] in recipes() and _is_kept(folder, args, recipe):
        jobs.tell(folder)
        return
    import rung

    if asked.dry_run:
        print("\n".join(rung.estimate(recipe).lines))
        return

    def job(listener: Listener) -> object:
        return rung.train(recipe, folder=folder, listener=listener, or_resume=asked.or_resume)

    jobs.follow(folder, job, tensorboard=asked.tensorboard)


def _is_kept(folder: Path, args: Sequence[str], recipe: GroupRL) -> bool:
    """Is there a finished run of this built-in recipe, though the recipe itself, not what was typed, is another now?

    Says what has changed: who only asks for the result need not know, who wanted the new recipe must.
    """
    if not (folder / "model").exists() or not (record := read_run(folder)).finished:
        return False
    changed = config.diff(record.config, config.to_dict(recipe))
    typed = {TASK_OF.get(path[0], ".".join(path)) for path in _parsed(args)[1]}
    if not changed or any(name == path or name.startswith(path + ".") for name in changed for path in typed):
        return False
    names = one_line(", ".join(changed))
    print(f"This run is finished. Recipes have changed since ({names}); another --name trains anew.", file=sys.stderr)
    return True


def read(args: Sequence[str]) -> tuple[Train, GroupRL]:
    """What was asked, and the recipe with every change that was typed.  Raises ConfigError."""
    recipe, values = _parsed(args)
    own = {option.path for option in options.options_of(Train)}
    asked = Train(**{path[0]: value for path, value in values.items() if path in own})
    if METHOD in values:
        recipe = replace(recipe, method=METHODS[values[METHOD]])
    changes = {path: value for path, value in values.items() if path not in own and path != METHOD}
    return asked, options.changed(recipe, changes)


def _parsed(args: Sequence[str]) -> tuple[GroupRL, dict[options.Path, Any]]:
    """The recipe as it is, and what was typed."""
    if not args or args[0].startswith("-"):
        raise ConfigError(f"{COMMAND} needs a recipe as its first word. Known: {', '.join(recipes())}.")
    command = f"{COMMAND} {args[0]}"
    recipe = _with_task(load_recipe(args[0]), args)
    return recipe, options.parse(args, [*options.options_of(Train), *recipe_options(recipe)], command=command)


def recipes() -> Mapping[str, Callable[[], GroupRL]]:
    """The built-in recipes by name."""
    import rung.recipes

    return _functions(rung.recipes)


def load_recipe(word: str) -> GroupRL:
    """The recipe that a word means.  Raises ConfigError."""
    if word.endswith((".json", ".toml")):
        return config.load(word, GroupRL)
    if ":" not in word:
        known = recipes()
        if word not in known:
            raise ConfigError(
                f"there is no recipe {word!r}. {nearest(word, known)} "
                f"A recipe of your own is written file.py:function, or a .toml or .json file."
            )
        return known[word]()
    place, _, name = word.rpartition(":")
    functions = _functions(_module(place))
    if name not in functions:
        hint = nearest(name, functions) if functions else "It has no function that takes no argument."
        raise ConfigError(f"{place} has no recipe {name!r}. {hint}")
    try:
        recipe = functions[name]()
    except Exception as error:
        raise ConfigError(f"the recipe {word} raised {type(error).__name__}: {error}") from error
    if not isinstance(recipe, GroupRL):
        raise ConfigError(f"the recipe {word} must return a GroupRL (rung.train.config), and returned {type(recipe)}.")
    return recipe


def recipe_options(recipe: GroupRL) -> list[Option]:
    """Everything that can be changed in a recipe."""
    found = options.options_of(GroupRL, recipe, more=task_options(recipe.task.name, recipe.task.options))
    presets = tuple(METHODS)
    said = f"all cells of a method at once: {', '.join(presets)}"
    at = next(index for index, option in enumerate(found) if option.path[:1] == METHOD)
    return [*found[:at], Option(path=METHOD, kind=str, choices=presets, help=said), *found[at:]]


def _groups(found: Sequence[Option]) -> dict[str, list[Option]]:
    """Options under the heading of the part of a run that they belong to."""
    groups: dict[str, list[Option]] = {"the run": []}
    for option in found:
        part = option.path[0] if len(option.path) > 1 or option.path == METHOD else "the run"
        groups.setdefault(part, []).append(option)
    return groups


def _with_task(recipe: GroupRL, args: Sequence[str]) -> GroupRL:
    """The recipe with the task that `--task.name`, or `--data` and `--reward`, name.

    Another task has other options, so none of the recipe's are kept.
    """
    names, data, rewards = (
        _typed(args, flag) for flag in (Option(path=TASK_NAME, kind=str).flag, "--data", "--reward")
    )
    if rewards and not data:
        raise ConfigError("--reward judges answers to the questions of a file: give it with --data FILE.jsonl.")
    if data and names:
        raise ConfigError("--data is a task of its own: give it or --task.name, not both.")
    if data:
        name, options = ("rewards", {"rewards": ", ".join(rewards)}) if rewards else ("maths", {})
        kept = recipe.task.options if name == recipe.task.name else {}
        return replace(recipe, task=TaskSpec(name=name, options={**kept, "data": data[-1], **options}))
    if names and names[-1] != recipe.task.name:
        recipe = replace(recipe, task=TaskSpec(name=names[-1]))
    parts = typed_parts(args) if recipe.task.name == "mixture" else {}  # whose options are the mixture's
    return replace(recipe, task=replace(recipe.task, options={**recipe.task.options, **parts}))


def _typed(args: Sequence[str], flag: str) -> list[str]:
    """What was typed after a flag, each time."""
    found = []
    for word, after in zip(args, [*args[1:], ""], strict=True):
        value = after if word == flag else word.partition("=")[2] if word.startswith(flag + "=") else ""
        found += [value] if value else []
    return found


def _module(place: str) -> ModuleType:
    """A module by name, or by the path of its file.  Raises ConfigError, with what its code raised."""
    try:
        if not place.endswith(".py"):
            return import_module(place)
        if not Path(place).is_file():
            raise ConfigError(f"there is no recipe file {place}.")
        spec = spec_from_file_location(f"rung_recipe_{Path(place).stem}", place)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"the recipes of {place} cannot be read: {type(error).__name__}: {error}") from error


def _functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """The module's own public functions that can be called without arguments."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and value.__module__.startswith(module.__name__)
        and all(
            p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            for p in inspect.signature(value).parameters.values()
        )
    }
