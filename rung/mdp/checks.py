"""What is no Markov decision process is refused, by the name of its state and action."""

from typing import Any

import numpy as np

from rung.core.errors import ModelError
from rung.core.memory import available_memory

ROUNDING = 1e-9  # by which the probabilities of a row may sum to more than one


def room_for(states: int, *, pairs: int, outcomes: int) -> None:
    """Raises ModelError where so many states, each of so many pairs of so many outcomes, do not fit into memory."""
    least, free = states * (16 + pairs * (24 + outcomes * 16)), available_memory()
    if least > free:
        raise ModelError(
            f"{states:,} states need at least {least / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. "
            "docs/guide/planning.md says how large models are spread over machines"
        )


def check(mdp: Any) -> None:
    """Raises ModelError for whatever is wrong with a FiniteMDP."""
    if not 0 <= mdp.gamma <= 1:
        raise ModelError(f"gamma is between 0 and 1; got {mdp.gamma}")
    _check_shape(mdp)
    _check_transitions(mdp)
    if not np.isfinite(mdp.reward_N).all():
        pair = int((~np.isfinite(mdp.reward_N)).argmax())
        raise ModelError(f"{_pair(mdp, pair)}: the reward is {mdp.reward_N[pair]}; it must be finite")
    if (mdp.chance_N > 1 + ROUNDING).any():
        pair = int(mdp.chance_N.argmax())
        raise ModelError(
            f"{_pair(mdp, pair)}: the probabilities sum to {mdp.chance_N[pair]:.12g}; at most 1 (less: the rest ends)"
        )
    if mdp.reward_M is not None:
        mean_N = mdp.mean_of(mdp.reward_M)
        wrong_N = abs(mean_N - mdp.reward_N) > 1e-9 * max(1.0, float(abs(mdp.reward_M).max(initial=0.0)))
        if wrong_N.any():
            pair = int(wrong_N.argmax())
            raise ModelError(
                f"{_pair(mdp, pair)}: the reward is {mdp.reward_N[pair]:g}, and those of its transitions have the mean "
                f"{mean_N[pair]:g}"
            )
    if mdp.start_S is not None and not (abs(mdp.start_S.sum() - 1) <= ROUNDING and (mdp.start_S >= 0).all()):
        raise ModelError(f"the start distribution sums to {mdp.start_S.sum():.12g}; it must sum to 1, nothing negative")


def _pair(mdp: Any, pair: int) -> str:
    return f"{mdp.state_name(int(mdp.state_N[pair]))}, {mdp.action_name(int(mdp.action_N[pair]))}"


def _check_transitions(mdp: Any) -> None:
    states = mdp.num_states
    rules = (
        ("probability", mdp.prob_M, lambda x: np.isfinite(x) & (x >= 0), "0 or more"),
        ("next state", mdp.next_M, lambda x: (x >= 0) & (x < states), f"0 to {states - 1}"),
        ("reward", mdp.reward_M, np.isfinite, "finite"),
        ("factor on gamma", mdp.keep_M, lambda x: (x >= 0) & (x <= 1), "between 0 and 1"),
    )
    for name, numbers, holds, needed in rules:
        if numbers is None or holds(numbers).all():
            continue
        at = int((~holds(numbers)).argmax())
        pair = int(np.searchsorted(mdp.row_N1, at, side="right")) - 1
        raise ModelError(f"{_pair(mdp, pair)}: the {name} of a transition is {numbers[at]}; it must be {needed}")


def _check_shape(mdp: Any) -> None:
    states, pairs, transitions = mdp.num_states, len(mdp.action_N), len(mdp.prob_M)
    if states < 1:
        raise ModelError("a model needs at least one state")
    expected = {
        "reward_N": pairs,
        "row_N1": pairs + 1,
        "next_M": transitions,
        "reward_M": transitions,
        "keep_M": transitions,
        "start_S": states,
    }
    for name, length in expected.items():
        array = getattr(mdp, name)
        if array is not None and array.shape != (length,):
            raise ModelError(f"{name} has the shape {array.shape}; needed is ({length},)")
    for name, ends_at in (("first_S1", pairs), ("row_N1", transitions)):
        starts = getattr(mdp, name)
        if starts[0] != 0 or starts[-1] != ends_at or (np.diff(starts) < 0).any():
            raise ModelError(f"{name} must rise from 0 to {ends_at}")
    if pairs and not ((mdp.action_N >= 0) & (mdp.action_N < mdp.num_actions)).all():
        raise ModelError(f"actions are numbers from 0 to {mdp.num_actions - 1}")
    _check_actions(mdp)
    if len(mdp.state_names) not in (0, states) or len(mdp.action_names) not in (0, mdp.num_actions):
        raise ModelError(f"names are given to all of {states} states and {mdp.num_actions} actions, or to none")


def _check_actions(mdp: Any) -> None:
    """No action twice in a state."""
    same_state = mdp.state_N[1:] == mdp.state_N[:-1]
    if (mdp.action_N[1:] > mdp.action_N[:-1])[same_state].all():
        return  # they rise: the usual case, and quick to see
    cell_N = np.sort(mdp.state_N * mdp.num_actions + mdp.action_N)
    twice = np.flatnonzero(cell_N[1:] == cell_N[:-1])
    if len(twice):
        state, action = divmod(int(cell_N[twice[0]]), mdp.num_actions)
        raise ModelError(f"{mdp.state_name(state)} has {mdp.action_name(action)} twice")
