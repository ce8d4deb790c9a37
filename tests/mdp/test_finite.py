"""Models: the same process from every builder, and bad ones refused with the state, the action and the number."""

import numpy as np
import pytest

from rung.core.errors import ConfigError, ModelError
from rung.mdp import finite, zoo
from rung.mdp.planning import solve
from rung.mdp.zoo.generated import hash_of

MODEL = {
    "low": {"wait": [(0.5, "low", 1.0), (0.5, "high", 0.0)], "work": [(0.9, "high", -1.0), (0.1, None, -5.0)]},
    "high": {"wait": [(1.0, "low", 2.0)]},
}


def rows(mdp: finite.FiniteMDP) -> list[tuple[str, str, dict[str, float], float]]:
    return [
        (
            mdp.state_names[mdp.state_N[n]],
            mdp.action_names[mdp.action_N[n]],
            {mdp.state_names[mdp.next_M[m]]: mdp.prob_M[m] for m in range(mdp.row_N1[n], mdp.row_N1[n + 1])},
            mdp.reward_N[n],
        )
        for n in range(mdp.num_pairs)
    ]


def test_a_dictionary_becomes_sparse_rows():
    mdp = finite.from_dict(MODEL, 0.9, start={"low": 1.0})
    assert rows(mdp) == [
        ("low", "wait", {"low": 0.5, "high": 0.5}, 0.5),
        ("low", "work", {"high": 0.9, "None": 0.1}, pytest.approx(-1.4)),
        ("high", "wait", {"low": 1.0}, 2.0),
    ]
    assert mdp.terminal_S.tolist() == [False, False, True]
    assert mdp.first_state_S.tolist() == [1, 0, 0]
    assert mdp.pair(0, 1) == 1


def test_a_function_finds_the_states_that_can_be_reached():
    mdp = finite.from_function(lambda n: {"halve": [(1.0, n // 2, -1.0)]} if n else {}, [20], 1.0)
    assert mdp.state_names == ["20", "10", "5", "2", "1", "0"]
    assert np.allclose(solve(mdp).v_S, [-5, -4, -3, -2, -1, 0], atol=1e-9)


def test_arrays_batches_and_a_dictionary_give_the_same_values():
    by_name = finite.from_dict(MODEL, 0.9)
    prob, reward = np.zeros((3, 2, 3)), np.zeros((3, 2, 3))
    legal = np.array([[True, True], [True, False], [False, False]])
    prob[0, 0, :2], prob[0, 1, 1:], prob[1, 0, 0] = 0.5, (0.9, 0.1), 1.0
    reward[0, 0, 0], reward[0, 1, 1], reward[0, 1, 2], reward[1, 0, 0] = 1.0, -1.0, -5.0, 2.0
    by_array = finite.from_arrays(prob, reward, 0.9, legal_SA=legal)

    def batches():
        for s in range(3):
            pairs = slice(by_name.first_S1[s], by_name.first_S1[s + 1])
            m = slice(by_name.row_N1[pairs.start], by_name.row_N1[pairs.stop])
            yield finite.Rows(
                pairs_S=np.array([pairs.stop - pairs.start]),
                action_N=by_name.action_N[pairs],
                counts_N=np.diff(by_name.row_N1)[pairs],
                next_M=by_name.next_M[m],
                prob_M=by_name.prob_M[m],
                reward_N=by_name.reward_N[pairs],
            )

    by_batch = finite.from_batches(batches(), 0.9, num_states=3, num_actions=2)
    values = [solve(mdp, epsilon=1e-10).v_S for mdp in (by_name, by_array, by_batch)]
    assert np.allclose(values[0], values[1], atol=1e-9)
    assert np.allclose(values[0], values[2], atol=1e-9)


def test_a_factor_on_gamma_per_transition_ends_an_episode_there():
    loop = {"row_N1": np.array([0, 2]), "next_M": np.zeros(2, int), "prob_M": np.array([0.5, 0.5])}
    one = {"first_S1": np.array([0, 1]), "action_N": np.zeros(1, int), "reward_N": np.ones(1), "num_actions": 1}
    mdp = finite.FiniteMDP(**loop, **one, gamma=1.0, keep_M=np.array([1.0, 0.0]))
    assert solve(mdp).v_S == pytest.approx([2.0])  # a fair coin: two steps


def changed(**fields):
    good = finite.from_dict(MODEL, 0.9)
    return lambda: finite.FiniteMDP(**{**{f: getattr(good, f) for f in good.__dataclass_fields__}, **fields})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            changed(prob_M=np.array([0.5, 0.6, 0.9, 0.1, 1.0])),
            "state low, action wait: the probabilities sum to 1.1; at most 1",
        ),
        (
            changed(prob_M=np.array([0.5, 0.5, -0.9, 0.1, 1.0])),
            "state low, action work: the probability of a transition is -0.9",
        ),
        (
            changed(prob_M=np.array([0.5, 0.5, 0.9, 0.1, np.nan])),
            "state high, action wait: the probability of a transition is nan",
        ),
        (changed(reward_N=np.array([0.0, np.inf, 0.0])), "state low, action work: the reward is inf"),
        (
            changed(next_M=np.array([0, 1, 1, 7, 0])),
            "state low, action work: the next state of a transition is 7; it must be 0 to 2",
        ),
        (changed(start_S=np.array([1.0, np.nan, 0.0])), "the start distribution sums to nan"),
        (changed(keep_M=np.array([1.0, 1.0, 1.0, 1.0, 1.1])), "state high, action wait: the factor on gamma of a"),
        (changed(action_N=np.array([0, 0, 0])), "state low has action wait twice"),
        (changed(reward_N=np.array([3.0, 0.0, 0.0])), "the reward is 3, and those of its transitions have the mean"),
        (changed(gamma=1.2), "gamma is between 0 and 1; got 1.2"),
        (changed(gamma=float("nan")), "gamma is between 0 and 1; got nan"),
        (changed(start_S=np.array([0.5, 0.2, 0.0])), "the start distribution sums to 0.7"),
        (changed(reward_N=np.zeros(2)), r"reward_N has the shape \(2,\); needed is \(3,\)"),
        (changed(row_N1=np.array([0, 3, 2, 5])), "row_N1 must rise from 0 to 5"),
        (changed(action_N=np.array([0, 2, 0])), "actions are numbers from 0 to 1"),
        (changed(state_names=["a"]), "names are given to all of 3 states"),
        (lambda: finite.from_arrays(np.zeros((2, 2)), np.zeros((2, 2)), 0.9), r"got shape \(2, 2\)"),
        (
            lambda: finite.from_dict(MODEL, 0.9, start={"mid": 1.0}),
            "names the state 'mid', which the model does not have",
        ),
    ],
)
def test_a_model_that_is_none_is_refused_by_name(make, message):
    with pytest.raises(ModelError, match=message):
        make()


def test_a_billion_states_are_refused_before_the_first_is_made(monkeypatch):
    monkeypatch.setattr("rung.mdp.checks.available_memory", lambda: 24e9)

    def never():
        raise AssertionError("a batch was asked for")
        yield

    with pytest.raises(ModelError, match=r"1,000,000,000 states need at least 56\.0 GB"):
        finite.from_batches(never(), 0.9, num_states=10**9, num_actions=2)


def test_an_illegal_action_names_the_legal_ones():
    mdp = finite.from_dict(MODEL, 0.9)
    with pytest.raises(ModelError, match="action work is illegal in state high; legal: action wait"):
        mdp.pair(1, 1)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("..\n.", {}, "lines of equal length"),
        ("", {}, "lines of equal length"),
        (".X", {}, r"found \['X'\]"),
        ("..", {"slip": 0.6}, "slip is the chance of each of two sides"),
        ("..", {"forbidden": "avoid"}, r"forbidden is one of \('enter', 'block'\); got 'avoid'"),
        ("..", {"actions": ("north",)}, r"got \['north'\]"),
    ],
)
def test_a_drawing_that_is_no_grid_is_refused(text, options, message):
    with pytest.raises(ConfigError, match=message):
        zoo.grid(text, 0.9, **options)


def test_the_conventions_of_forbidden_cells_differ_where_they_say_so():
    enter, block = (zoo.grid(".#T", 0.9, forbidden=kind) for kind in ("enter", "block"))
    right = 1
    assert enter.next_M[enter.row_N1[enter.pair(0, right)]] == 1
    assert block.next_M[block.row_N1[block.pair(0, right)]] == 0
    assert enter.reward_N[enter.pair(0, right)] == block.reward_N[block.pair(0, right)] == -1
    both = zoo.grid(".#T", 0.9, bump="both", forbidden_reward=-10.0)
    assert both.reward_N[both.pair(1, 0)] == -11
    assert both.reward_N[both.pair(0, 0)] == -1
    assert zoo.grid(".#T", 0.9, target="end").terminal_S.tolist() == [False, False, True]


def test_generated_models_are_those_of_their_seed():
    assert len({hash_of(zoo.garnet(50, 3, 4, gamma=0.9, seed=s)) for s in (0, 0, 1)}) == 2
    assert hash_of(zoo.maze(8, 8)) == hash_of(zoo.maze(8, 8)) != hash_of(zoo.maze(8, 8, seed=1))


def test_a_perfect_maze_has_one_way_between_any_two_cells():
    """As many open sides as a tree of 60 cells has edges; and every cell reaches the goal."""
    mdp = zoo.maze(6, 10, slip=0.0)
    from_M = np.repeat(mdp.state_N, np.diff(mdp.row_N1))
    edges = {frozenset((int(s), int(t))) for s, t in zip(from_M, mdp.next_M, strict=True) if s != t}
    assert len(edges) == 59
    assert np.isfinite(solve(mdp.with_gamma(1.0)).v_S).all()


def test_an_open_maze_is_one_part_with_about_a_quarter_walls():
    mdp = zoo.open_maze(60, 60)
    assert 0.6 * 3600 < mdp.num_states < 0.8 * 3600
    assert np.isfinite(solve(mdp.with_gamma(1.0)).v_S).all()


def test_sums_of_many_rows_equal_their_twin(monkeypatch):
    """Compiled and not, rows of none among them."""
    monkeypatch.setattr(finite, "MANY", 0)
    row_N1, numbers_M = np.array([0, 0, 3, 3, 4, 9, 9]), np.arange(1.0, 10.0)
    assert finite.sums(numbers_M, row_N1).tolist() == [0, 6, 0, 4, 35, 0]
    assert finite.sums(numbers_M, row_N1, twin=True).tolist() == [0, 6, 0, 4, 35, 0]


def test_a_maze_is_carved_as_a_walk_that_calls_itself_does():
    """Depth first from cell 0, each cell's neighbours in its own order."""
    from rung.mdp.kernels import carve

    rows, columns = 6, 7
    order_S4 = np.random.default_rng(0).permuted(np.tile(np.arange(4), (rows * columns, 1)), axis=1)
    open_S4, expected_S4, seen = np.zeros((42, 4), bool), np.zeros((42, 4), bool), set()

    def visit(cell: int) -> None:
        seen.add(cell)
        for side in order_S4[cell]:
            row, column = cell // columns + [-1, 0, 1, 0][side], cell % columns + [0, 1, 0, -1][side]
            there = row * columns + column
            if 0 <= row < rows and 0 <= column < columns and there not in seen:
                expected_S4[cell, side] = expected_S4[there, (side + 2) % 4] = True
                visit(there)

    visit(0)
    carve(rows, columns, order_S4, open_S4)
    assert (open_S4 == expected_S4).all()
    assert expected_S4.sum() == 2 * (rows * columns - 1)
