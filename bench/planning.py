"""Exact planning and tabular learning against the Python peers: seconds to values certified to 1e-6, and updates/s.

pip install -e '.[peers]' && pip install --no-deps bettermdptools     # which asks for an older NumPy, and does without
"""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from bench.harness import RESULTS, Options, Side, Turn, announce, compare, measure, options, seconds
from rung.mdp import zoo
from rung.mdp.zoo.generated import hash_of

MAZES = ("maze", "open_maze")


def main() -> None:
    """A Garnet, two mazes small and large, and Q-learning."""
    parts = {"garnet": garnet, "mazes": mazes, "large": large, "growth": growth, "learning": learning}
    given = options(__doc__, parts=tuple(parts), model=False)
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
        "reference": "krylov",
    }
    once = replace(given, repeats=1)  # minutes a turn
    for peer, bar, turns in (("quantecon", ">= 1", given), ("mdpsolver", ">= 5", given), ("pymdptoolbox", "-", once)):
        _against(f"Garnet {size}, gamma 0.99", spec, peer, bar, turns)


def mazes(given: Options) -> None:
    """10^4 states, slip 0.1 to each side, gamma 0.999."""
    side = 10 if given.quick else 100
    for name in MAZES:
        spec = {"model": name, "options": {"rows": side, "columns": side}, "reference": "gauss-seidel"}
        for peer, bar in (("scipy_bicgstab", ">= 2"), ("scipy_splu", "-")):
            _against(_named(name, side), spec, peer, bar, given)


def large(given: Options) -> None:
    """The same mazes at 10^6 cells, ours alone, the drawing of the maze included."""
    side = 20 if given.quick else 1000
    for name in MAZES:
        _alone(name, side, "<= 60", given)


def growth(given: Options) -> None:
    """From 10^4 to 10^7 cells: seconds, products and peak memory; drawn into bench/results/growth.svg."""
    import matplotlib.pyplot as plt

    sides = (10, 20) if given.quick else (100, 316, 1000, 3162)
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for name in MAZES:
        taken = [_alone(name, side, "-", replace(given, repeats=1)) for side in sides]
        axes.loglog([side**2 for side in sides], taken, "o-", label=name.replace("_", " "))
    axes.set(xlabel="cells", ylabel="seconds to values proved to 1e-6")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    if not given.quick:
        RESULTS.mkdir(exist_ok=True)
        figure.savefig(RESULTS / "growth.svg")


def learning(given: Options) -> None:
    """10^6 updates of Q-learning on Taxi, counted over lanes; and of one compiled stream."""
    updates, lanes = (1000, 10) if given.quick else (1_000_000, 4000)
    episodes = 2 if given.quick else 300
    peer = Side(name="bettermdptools", job="bench.planners:q_learning_bettermdptools", spec={"episodes": episodes})
    for name, count in ((f"{lanes} lanes", lanes), ("one compiled stream", 0)):
        spec = {"lanes": count, "updates": updates}
        ours = Side(name="rung", job="bench.planners:q_learning", spec=spec)
        what = f"Q-learning on Taxi-v4, {updates:,} updates, {name}"
        if find_spec("bettermdptools") is None:
            measure(what, ours, _rate, unit="updates/s", bar="- (bettermdptools is not installed)", given=given)
            continue
        compare(what, ours, [peer], _rate, unit="updates/s", bar=">= 50", given=given)


def _rate(turn: Turn) -> float:
    return turn["updates"] / turn["seconds"]


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
        off, iterations = max(turn["off"] for turn in turns), turns[0].get("iterations", 0)
        print(f"  {name}: off by {off:.2g}, {iterations:.0f} iterations {turns[0].get('solver', '')}")


def _alone(name: str, side: int, bar: str, given: Options) -> float:
    """Prints a line; returns the median of the seconds."""
    spec = {"model": name, "options": {"rows": side, "columns": side}, "anew": True}
    ours = Side(name="rung", job="bench.planners:ours", spec=spec)
    result = measure(_named(name, side), ours, seconds, unit="s", bar=bar, given=given)
    last = result["turns"][-1]
    print(
        f"  {last['solver']}: proved to {last['proved']:.2g}; {last['products']:,} products with all pairs, "
        f"{last['policy_products']:,} with those of a policy; peak memory {last['peak_bytes'] / 1e9:.2f} GB"
    )
    return float(result["median"])


def _named(name: str, side: int) -> str:
    mdp = getattr(zoo, name)(side, side)
    return f"{name} {side} x {side}: {mdp.num_states:,} states, hash of P {hash_of(mdp)}"


if __name__ == "__main__":
    main()
