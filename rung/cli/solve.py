"""`rung solve MODEL`"""

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

from rung.cli import options
from rung.cli.options import Option
from rung.core.errors import ConfigError, nearest

COMMAND = "rung solve"
WORD_KINDS = (int, float, str, bool)
PICTURES = (".svg", ".png", ".pdf", ".gif")
FRAMES = 200  # of an animation at most


@dataclass(frozen=True, kw_only=True)
class Solve:
    """Solve a finite Markov decision process, and prove how close the answer is.

    model: a name of rung.mdp.zoo, an environment of Gymnasium's toy text, a text file with a drawn grid, or
        file.py:function that returns a FiniteMDP
    method: auto, value, policy, krylov, gmres, truncated, gauss-seidel or prioritized; average: the best reward a step
    gamma: discount; where it is not given, the model's own
    epsilon: how far from the optimum a value may be
    horizon: instead, the best sum of rewards over so many steps
    picture: also draw a grid world into this file (.svg, .png), or the sweeps (.gif)
    """

    model: str
    method: str = "auto"
    gamma: float = float("nan")
    epsilon: float = 1e-6
    horizon: int = 0
    picture: str = ""


def help(args: list[str]) -> str:
    """With a model as first word, its own options too."""
    general = {"options": options.options_of(Solve)}
    if not args or args[0].startswith("-"):
        from rung.mdp import zoo

        said = f"Models of the zoo: {', '.join(zoo.__all__)}. `{COMMAND} MODEL --help` lists a model's own options too."
        return options.help_text(COMMAND, f"{options.summary_of(Solve)} {said}", general)
    return options.help_text(COMMAND, options.summary_of(Solve), {**general, f"model {args[0]}": _options(args[0])})


def run(args: list[str]) -> None:
    if not args or args[0].startswith("--"):
        raise ConfigError(f"{COMMAND} needs MODEL as its first word. See `{COMMAND} --help`.")
    values = options.parse(args, [*options.options_of(Solve), *_options(args[0])], command=COMMAND)
    asked = Solve(**{path[0]: value for path, value in values.items() if len(path) == 1})
    _check_picture(asked.picture)
    mdp = _made(asked.model, {path[1]: value for path, value in values.items() if len(path) == 2}, asked.gamma)
    if asked.horizon:
        _over(mdp, asked.horizon)
    elif asked.method == "average":
        _average(mdp, asked.epsilon)
    else:
        _discounted(mdp, asked)


def _over(mdp: Any, steps: int) -> None:
    from rung.mdp import pictures
    from rung.mdp.horizons import finite_horizon
    from rung.mdp.operators import q_values, ties

    if steps < 0:
        raise ConfigError(f"--horizon is a number of steps; got {steps}")
    v_TS, _ = finite_horizon(mdp, steps)
    print(pictures.as_text(mdp, v_TS[-1], ties(mdp, q_values(mdp, v_TS[-2]))))
    begun = float(mdp.first_state_S @ v_TS[-1])
    print(f"the best of {steps} steps, and the first of their actions: {begun:.6f} from the start", file=sys.stderr)


def _average(mdp: Any, epsilon: float) -> None:
    from rung.mdp import pictures
    from rung.mdp.horizons import average_reward
    from rung.mdp.operators import q_values, ties

    found = average_reward(mdp, epsilon=epsilon)
    tied_N = ties(mdp, q_values(mdp.with_gamma(1.0), found.relative_S), tolerance=10 * epsilon)
    print(pictures.as_text(mdp, found.relative_S, tied_N))
    print(f"{found.lower:.9g} <= reward a step <= {found.upper:.9g}; above: relative values", file=sys.stderr)


def _discounted(mdp: Any, asked: Solve) -> None:
    from rung.mdp import pictures
    from rung.mdp.planning import Iterate, solve

    sweeps: list[Any] = []

    def keep(iterate: Iterate) -> None:
        if asked.picture.endswith(".gif") and len(sweeps) < FRAMES:
            sweeps.append(iterate.v_S.copy())

    found = solve(mdp, asked.method, epsilon=asked.epsilon, listener=keep)
    print(pictures.as_text(mdp, found.v_S, found.optimal_N))
    print(
        f"{mdp.num_states:,} states, {mdp.num_pairs:,} pairs, gamma {mdp.gamma:g}: {found.method}, "
        f"{found.iterations:,} iterations, {found.products:,} products with all pairs and "
        f"{found.policy_products:,} with those of a policy, {found.seconds:.3f} s; "
        f"every value within {found.error:.2g} of the optimum (proved)",
        file=sys.stderr,
    )
    if asked.picture.endswith(".gif"):
        pictures.animate(mdp, sweeps, asked.picture)
    elif asked.picture:
        pictures.draw(mdp, found.v_S, found.optimal_N, asked.picture)


def _check_picture(path: str) -> None:
    """Before anything is computed."""
    if path and Path(path).suffix not in PICTURES:
        raise ConfigError(f"--picture ends in {', '.join(PICTURES)}; got {path}")
    if path and not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--picture: there is no folder {Path(path).parent}")


def _maker(name: str) -> Callable[..., Any]:
    """The function that makes a model, whatever its name is."""
    from rung.mdp import zoo

    if name in zoo.__all__:
        return getattr(zoo, name)
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_file(path, function)
    if Path(name).is_file():
        try:
            return partial(zoo.grid, Path(name).read_text())
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name} is no text, so no drawing of a grid") from error
    if name == "Blackjack-v1":
        return zoo.blackjack
    if re.fullmatch(r"[\w/:]+-v\d+", name):
        from rung.mdp.finite import from_gymnasium

        return lambda gamma=0.99: from_gymnasium(_environment(name), gamma)
    raise ConfigError(
        f"{name!r} is no model: no file has this name, and the zoo has none. {nearest(name, zoo.__all__)}"
    )


def _from_file(path: str, function: str) -> Callable[..., Any]:
    spec = util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ConfigError(f"there is no file {path}")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if function not in vars(module):
        raise ConfigError(f"{path} has no function {function!r}. {nearest(function, vars(module))}")
    if not callable(vars(module)[function]):
        raise ConfigError(f"{function} of {path} is no function")
    return vars(module)[function]


def _environment(name: str) -> Any:
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name} is an environment of Gymnasium: pip install gymnasium") from error
    try:
        return gymnasium.make(name)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise ConfigError(f"Gymnasium makes no {name}: {error}") from error


def _made(name: str, given: dict[str, Any], gamma: float) -> Any:
    maker = _maker(name)
    parameters = inspect.signature(maker).parameters
    takes_gamma = "gamma" in parameters
    if gamma == gamma and takes_gamma:
        given = {**given, "gamma": gamma}
    for parameter in parameters.values():
        needed = parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
        if needed and given.get(parameter.name) is None:
            option = "--gamma" if parameter.name == "gamma" else f"--model.{parameter.name.replace('_', '-')}"
            raise ConfigError(f"{name} needs {option}")
    found = maker(**given)
    mdp = found[0] if isinstance(found, tuple) else found  # some come with features
    from rung.mdp.finite import FiniteMDP

    if not isinstance(mdp, FiniteMDP):
        raise ConfigError(f"{name} returned {type(mdp).__name__}, and not a FiniteMDP")
    return mdp.with_gamma(gamma) if gamma == gamma and not takes_gamma else mdp


def _options(name: str) -> list[Option]:
    """What a model's function takes, as --model.NAME; what no word can stand for is left out."""
    found = []
    for parameter in inspect.signature(_maker(name)).parameters.values():
        kinds = (parameter.annotation, type(parameter.default))
        kind = next((kind for kind in kinds if kind in WORD_KINDS), None)
        if kind is not None and parameter.name != "gamma":
            default = None if parameter.default is parameter.empty else parameter.default
            found.append(Option(path=("model", parameter.name), kind=kind, default=default))
    return found
