import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque

import pytest

from rung.core.errors import TaskError
from rung.core.words import Answer, Grade, unknown
from rung.tasks import sandbox
from rung.tasks.arithmetic import Arithmetic
from rung.tasks.load import load_task
from rung.tasks.sandbox import Grader, Limits, UnknownWatch

VERIFIER = """
import os, sys, time

words = ("cat", "house", "broken", "hopeless")
problems = [{"prompt": f"Spell {w} backwards.", "answer": w[::-1]} for w in words] + [{"prompt": "Say anything."}]

def reward(problem, text, *, marks=""):
    print("checking", text[:100])          # must not reach the protocol, from Python
    os.write(1, b'{"grade": {"score": 1}}')  # or from C
    if "hopeless" in problem.messages[0].content:
        raise RuntimeError("the verifier has a bug")
    if "broken" in problem.messages[0].content and text == problem.answer:
        while True:
            time.sleep(1)
    if marks and text == "die once" and not os.path.exists(marks):
        open(marks, "w").close()
        os._exit(1)
    act(text)
    return text == problem.answer

def act(text):
    match text:
        case "raise": raise ValueError("two\\nlines")
        case "exit": sys.exit(0)
        case "die": os._exit(7)
        case "crash": os.kill(os.getpid(), 11)
        case "hang":
            while True: pass
        case "sleep": time.sleep(60)
        case "chatter":
            while True: print("x" * 1000)
        case "flood": sys.stderr.write("y" * 10_000_000)
        case "close": os.close(1); os.close(2)
        case "mute": os.close(1); os.close(2); time.sleep(0.5)
        case "memory": bytearray(1 << 31)
        case "recurse": act("recurse")
        case "read": sys.stdin.read(); input()
        case "interrupt": raise KeyboardInterrupt
        case "wait": time.sleep(0.3)
        case "fork": os.fork()
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "verifier.py").write_text(VERIFIER)
    return f"{tmp_path / 'verifier.py'}:reward"


@pytest.fixture
def grader(place):
    with Grader(place, {}, Limits(seconds=0.7, memory_bytes=1 << 30)) as grader:
        yield grader


CAT, HOUSE, BROKEN, HOPELESS, OPEN = range(5)


def ask(place, *questions):
    task = load_task(place, {})
    return [Answer(problem=task.problem(i), text=text, stop="eos", num_tokens=1) for i, text in questions]


WRONG = {
    "raise": "ValueError: two lines (/",
    "exit": "SystemExit: 0",
    "die": "ended with exit code 7",
    "crash": "ended by SIGSEGV",
    "hang": "took more than 0.7 seconds",
    "sleep": "took more than 0.7 seconds",
    "chatter": "took more than 0.7 seconds",
    "memory": "MemoryError",
    "recurse": "RecursionError",
    "read": "EOFError",
    "interrupt": "KeyboardInterrupt",
}


def test_what_an_answer_does_to_the_verifier_is_wrong_and_its_neighbours_are_graded(place, grader):
    questions = [(CAT, "tac"), *((CAT, text) for text in WRONG), (CAT, "cat"), (HOUSE, "esuoh")]
    first, *wrong, plain, last = grader.grade(ask(place, *questions))
    assert first == last == Grade(score=1.0, right=True)
    assert plain == Grade(score=0.0)
    for grade, (text, reason) in zip(wrong, WRONG.items(), strict=True):
        assert (grade.score, grade.right) == (0.0, False), text
        assert reason in grade.error
        assert "\n" not in grade.error


def test_noise_on_every_channel_does_not_touch_the_grades(place, grader):
    """Closed channels make this verifier's own print fail: the next answers are graded in a new child."""
    texts = ["flood", "tac", "close", "flood", "tac"]
    grades = grader.grade(ask(place, *((CAT, text) for text in texts)))
    assert [grade.right for grade in grades] == [text == "tac" for text in texts]
    assert grades[1] == grades[4] == Grade(score=1.0, right=True)


def test_what_a_verifier_forks_does_not_answer_in_its_place(place, grader):
    """Both copies return: only one grade may come of it, or the next answers would get the grades of others."""
    texts = ["fork", "tac", "fork", "tac", "x", "tac"]
    grades = grader.grade(ask(place, *((CAT, text) for text in texts)))
    assert [grade.right for grade in grades] == [text == "tac" for text in texts]


def test_a_child_that_closed_its_channels_is_waited_for_and_not_polled(place, grader, monkeypatch):
    calls, select = [], sandbox.select.select
    monkeypatch.setattr(sandbox.select, "select", lambda *args: calls.append(args) or select(*args))
    grader.grade(ask(place, (CAT, "mute")))
    assert len(calls) < 20  # polling makes thousands in half a second


def test_a_verifier_that_fails_on_the_known_good_answer_too_leaves_the_grade_unknown(place, grader):
    questions = [(BROKEN, "nekorb"), (HOPELESS, "x"), (HOPELESS, "die"), (BROKEN, "die"), (BROKEN, "x"), (CAT, "tac")]
    *bad, right_no, good = grader.grade(ask(place, *questions))
    assert [grade.known for grade in bad] == [False] * 4
    assert "took more than 0.7 seconds; the known-good answer to the same problem fails too" in bad[0].error
    assert "RuntimeError: the verifier has a bug" in bad[1].error
    assert "verifier.py, line " in bad[1].error
    assert right_no == Grade(score=0.0)  # the verifier managed this one
    assert good.right


def test_where_no_answer_is_known_good_an_empty_one_shows_whether_the_verifier_works(place, grader):
    """`answer` is None, so that nothing is right; but an empty text passes through the verifier, and "die" does not."""
    died, fine = grader.grade(ask(place, (OPEN, "die"), (OPEN, "x")))
    assert (died.score, fine.score) == (0.0, 0.0)
    assert "exit code 7" in died.error


def test_a_child_lost_by_accident_costs_no_grade(place, tmp_path):
    with Grader(place, {"marks": str(tmp_path / "died")}, Limits(seconds=5.0, writable=True)) as grader:
        grades = grader.grade(ask(place, (CAT, "tac"), (CAT, "die once"), (CAT, "tac")))
    assert (tmp_path / "died").exists()
    assert grades == [Grade(score=1.0, right=True), Grade(score=0.0), Grade(score=1.0, right=True)]


@pytest.mark.parametrize("delay", [None, 0.1, 0.4])
def test_a_child_killed_from_outside_costs_no_grade(place, delay):
    """Between two batches, and in the middle of one (each answer takes 0.3 s)."""
    with Grader(place, {}, Limits(seconds=5.0)) as grader:
        child = grader._child._process
        if delay is None:
            child.kill()
            child.wait()
        else:
            threading.Timer(delay, child.kill).start()
        grades = grader.grade(ask(place, (CAT, "wait"), (CAT, "wait"), (CAT, "tac")))
        assert grader._child._process is not child
    assert grades == [Grade(score=0.0), Grade(score=0.0), Grade(score=1.0, right=True)]


def test_a_verifier_that_cannot_be_started_again_leaves_grades_unknown(place, tmp_path):
    answers = ask(place, (CAT, "tac"), (CAT, "die"), (HOUSE, "esuoh"), (CAT, "x"))
    with Grader(place, {}, Limits(seconds=5.0)) as grader:
        (tmp_path / "verifier.py").unlink()
        first, *others = grader.grade(answers)
        assert first.right
        assert all("the verifier is lost: there is no file" in grade.error for grade in others)
        assert not any(grade.known for grade in others)
        (tmp_path / "verifier.py").write_text(VERIFIER)
        assert [grade.score for grade in grader.grade(answers)] == [1.0, 0.0, 1.0, 0.0]


def test_files_of_the_current_folder_do_not_pass_for_modules_of_the_library(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise ImportError('a file of the user')")
    monkeypatch.chdir(tmp_path)
    with Grader("arithmetic", {}) as grader:
        assert grader.grade(ask("arithmetic", (0, "20")))[0].right


def test_a_task_that_cannot_be_loaded_is_refused_at_the_start(tmp_path):
    (tmp_path / "bad.py").write_text("import os\nos._exit(4)\n")
    with pytest.raises(TaskError, match="the verifier's process ended with exit code 4"):
        Grader(f"{tmp_path / 'bad.py'}:reward", {})
    with pytest.raises(TaskError, match="has no option 'digit'"):
        Grader("arithmetic", {"digit": 2})


def test_computing_time_is_limited_where_the_clock_is_generous(place):
    with Grader(place, {}, Limits(seconds=60.0, cpu_seconds=1)) as grader:
        busy, good = grader.grade(ask(place, (CAT, "hang"), (CAT, "tac")))
    assert (busy.score, good.score) == (0.0, 1.0)
    assert "SIGXCPU" in busy.error


def test_the_limit_of_computing_time_is_of_each_answer_not_of_the_childs_life(tmp_path):
    (tmp_path / "busy.py").write_text(
        "import time\nproblems = [{'prompt': 'a', 'answer': 'b'}]\n"
        "def reward(problem, text):\n    end = time.process_time() + 0.3\n    while time.process_time() < end: pass\n"
        "    return 1.0\n"
    )
    name = f"{tmp_path / 'busy.py'}:reward"
    with Grader(name, {}, Limits(seconds=60.0, cpu_seconds=1)) as grader:
        child = grader._child
        assert all(grade.right for grade in grader.grade(ask(name, *[(0, "b")] * 5)))
        assert grader._child is child


def test_grades_equal_those_of_the_task_in_this_process():
    task = Arithmetic(operations="+-*", digits=3)
    texts = ["12", "-5", "", "no", "9" * 5000, "\ud800\0\u2028\n", "1,234", *(task.problem(i).answer for i in range(9))]
    answers = [
        Answer(problem=task.problem(i), text=text, stop=stop, num_tokens=3)
        for i, text in enumerate(texts)
        for stop in ("eos", "stop", "length")
    ]
    with Grader("arithmetic", {"operations": "+-*", "digits": 3}) as grader:
        assert grader.grade(answers) == task.grade(answers)
        assert grader.grade([]) == []


def test_a_task_that_says_unknown_is_believed(tmp_path):
    (tmp_path / "shy.py").write_text(
        "from rung.core.words import unknown\nproblems = [{'prompt': 'a', 'answer': 'b'}]\n"
        "def reward(problem, text):\n    return 1.0 if text == 'b' else unknown('the judge is asleep')\n"
    )
    name = f"{tmp_path / 'shy.py'}:reward"
    with Grader(name, {}) as grader:
        assert grader.grade(ask(name, (0, "x"), (0, "b"))) == [
            unknown("the judge is asleep"),
            Grade(score=1.0, right=True),
        ]


def test_an_interrupted_batch_does_not_shift_the_grades_of_the_next(place, grader):
    def interrupt(*_):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.45)
    try:
        with pytest.raises(KeyboardInterrupt):
            grader.grade(ask(place, *[(CAT, "wait")] * 5, (CAT, "tac")))
    finally:
        signal.signal(signal.SIGALRM, old)
    assert [grade.right for grade in grader.grade(ask(place, (CAT, "x"), (CAT, "tac")))] == [False, True]


PARENT = """
import sys, threading
from rung.core.words import Answer
from rung.tasks import sandbox
from rung.tasks.load import load_task
from rung.tasks.sandbox import Grader, Limits
grader = Grader(sys.argv[1], {}, Limits(seconds=100.0))
print(grader._child._process.pid, flush=True)
answer = Answer(problem=load_task(sys.argv[1], {}).problem(0), text=sys.argv[2], stop="eos", num_tokens=1)
grader.grade([answer])
print("graded", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("text", ["tac", "sleep", "hang"])
def test_no_child_outlives_a_parent_that_was_killed(place, text):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, place, text], stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    if text == "tac":
        parent.stdout.readline()
    else:
        time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while running(child):
        assert time.monotonic() < end
        time.sleep(0.05)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"  # a zombie waits only for init
    except FileNotFoundError:
        return False


def test_ctrl_c_in_a_terminal_does_not_reach_the_child(grader):
    assert os.getsid(grader._child._process.pid) != os.getsid(0)


KNOWN, LOST = Grade(score=0.0), unknown("the judge is asleep")


def test_a_group_with_fewer_than_two_known_grades_is_dropped_and_counted():
    watch = UnknownWatch(share=1.0)
    groups = [[KNOWN] * 8, [LOST] * 6 + [KNOWN] * 2, [LOST] * 7 + [KNOWN], [LOST] * 8, [KNOWN], [LOST]]
    assert [watch.add(group) for group in groups] == [True, True, False, False, True, False]
    assert watch.dropped == 3


def test_five_per_cent_of_fifty_groups_may_be_unknown_and_one_more_stops_the_run():
    watch = UnknownWatch()
    for _ in range(20):  # 20 of 50 * 8 answers are 5 %
        watch.add([LOST] + [KNOWN] * 7)
    with pytest.raises(TaskError, match=r"failed on 21 of the last 168 answers.*more than 5% of 50 groups.*asleep"):
        watch.add([LOST] + [KNOWN] * 7)


def test_a_verifier_that_always_fails_stops_the_run_in_its_third_group():
    """20 unknown grades of groups of 8 are allowed, so that the 21st comes in the third."""
    watch = UnknownWatch()
    watch.add([LOST] * 8)
    watch.add([LOST] * 8)
    with pytest.raises(TaskError):
        watch.add([LOST] * 8)


def test_the_window_forgets_what_is_fifty_groups_old():
    watch = UnknownWatch()
    for _ in range(10):
        for unknowns in (2, 2, 2, 2, 2, *[0] * 45):  # 10 of 400 in every window of 50, for ever
            watch.add([LOST] * unknowns + [KNOWN] * (8 - unknowns))


def test_a_restored_watch_stops_where_the_uninterrupted_one_does():
    pattern = deque([0, 3, 0, 1, 0, 0, 2, 0, 1, 1])
    whole = UnknownWatch()
    for count in range(200):
        group = [LOST] * pattern[0] + [KNOWN] * (8 - pattern[0])
        resumed = UnknownWatch()
        resumed.restore(whole.state())
        stopped = [fails(watch, group) for watch in (whole, resumed)]
        assert stopped[0] == stopped[1]
        assert whole.state() == resumed.state()
        if stopped[0]:
            assert count > 2
            return
        pattern.rotate(-1)
    raise AssertionError("10 % unknown must stop the run")


def fails(watch, group):
    try:
        watch.add(group)
    except TaskError:
        return True
    return False
