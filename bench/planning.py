"""Exact planning and tabular learning against the Python peers: seconds to values certified to 1e-6, and updates/s.

pip install quantecon mdpsolver pymdptoolbox bettermdptools       # the peers; what is missing is left out
"""

from typing import Any

from bench.harness import RESULTS, Options, Side, announce, compare, measure, options, seconds
from rung.mdp import zoo
from rung.mdp.zoo.generated import hash_of

MAZES = ("maze", "open_maze")


def main() -> None:
    """A Garnet, two mazes small and large, and Q-learning."""
    parts = {"garnet": garnet, "mazes": mazes, "large": large, "growth": growth, "learning": learning}
    given = options(__doc__, parts=tuple(parts))
    announce(given)
    for name, part in parts.items():
        if given.wants(name):
            part(given)


def garnet(given: Options) -> None:
    """S = 20 000, A = 10, b = 5, gamma 0.99."""
    size = (200, 3, 3) if given.quick else (20_000, 10, 5)
    spec = {
        "model": "garnet",
        "options": dict(zip(("states", "actions", "branching"), size, strict=True)) | {"gamma": 0.99},
    }
    for peer, bar in (("quantecon", "<= 1.0 times"), ("mdpsolver", "<= 0.2 times"), ("pymdptoolbox", "-")):
        _against(f"Garnet {size}, gamma 0.99", spec, peer, bar, given)


def mazes(given: Options) -> None:
    """10^4 states, slip 0.1 to each side, gamma 0.999."""
    side = 10 if given.quick else 100
    for name in MAZES:
        spec = {"model": name, "options": {"rows": side, "columns": side}}
        print(f"\n{name} {side} x {side}: hash of P {hash_of(getattr(zoo, name)(side, side))}")
        _against(f"{name} of {side * side:,} cells", spec, "scipy_policy_iteration", "<= 0.5 times", given)


def large(given: Options) -> None:
    """The same mazes at 10^6 cells, ours alone."""
    side = 20 if given.quick else 1000
    for name in MAZES:
        _alone(name, side, "<= 60 s", given)


def growth(given: Options) -> None:
    """From 10^4 to 10^7 cells: seconds, products and peak memory; drawn into bench/results/growth.svg."""
    import matplotlib.pyplot as plt

    sides = (10, 20) if given.quick else (100, 316, 1000, 3162)
    figure, axes = plt.subplots()
    for name in MAZES:
        axes.loglog([side**2 for side in sides], [_alone(name, side, "-", given) for side in sides], "o-", label=name)
    axes.set(xlabel="cells", ylabel="seconds to values proved to 1e-6")
    axes.legend()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "growth.svg")


def learning(given: Options) -> None:
    """10^6 updates of Q-learning on Taxi, counted over lanes."""
    spec: dict[str, Any] = {"lanes": 10, "updates": 1000} if given.quick else {"lanes": 1000, "updates": 1_000_000}
    peer = Side(
        name="bettermdptools",
        job="bench.planners:q_learning_bettermdptools",
        spec={"episodes": 2 if given.quick else 300},
    )
    for name, lanes in (("rung, lanes", spec["lanes"]), ("rung, one compiled stream", 0)):
        compare(
            f"Q-learning on Taxi-v4, {name}",
            Side(name=name, job="bench.planners:q_learning", spec={**spec, "lanes": lanes}),
            [peer],
            lambda turn: turn["updates"] / turn["seconds"],
            unit="updates/s",
            bar=">= 50",
            given=given,
        )


def _against(what: str, spec: dict[str, Any], peer: str, bar: str, given: Options) -> None:
    result = compare(
        what,
        Side(name="rung", job="bench.planners:ours", spec=spec),
        [Side(name=peer, job=f"bench.planners:{peer}", spec=spec)],
        seconds,
        unit="s",
        bar=bar,
        given=given,
        higher_is_better=False,
    )
    for name, turns in result["turns"].items():
        print(
            f"  {name}: off by {max(turn['off'] for turn in turns):.2g}, {turns[0].get('iterations', 0):.0f} iterations"
        )


def _alone(name: str, side: int, bar: str, given: Options) -> float:
    """Prints a line; returns the median of the seconds."""
    spec = {"model": name, "options": {"rows": side, "columns": side}, "check": False}
    what = f"{name} of {side * side:,} cells"
    result = measure(
        what, Side(name="rung", job="bench.planners:ours", spec=spec), seconds, unit="s", bar=bar, given=given
    )
    last = result["turns"][-1]
    print(
        f"  proved to {last['proved']:.2g} with {last['products']:,} products of all pairs; "
        f"peak memory {last['peak_bytes'] / 1e9:.2f} GB"
    )
    return float(result["median"])


if __name__ == "__main__":
    main()
