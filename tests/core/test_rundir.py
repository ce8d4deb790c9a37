import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rung.core.environment import environment
from rung.core.errors import RunError
from rung.core.journal import GradeJournal, GradeKey
from rung.core.rundir import RunDir, create, open_run, write_atomic
from rung.core.words import Grade, unknown
from rung.train.config import GroupRL, TaskSpec

RECIPE = GroupRL(name="r", task=TaskSpec(name="arithmetic", options={"digits": 3}), seed=5)


@pytest.fixture
def run(tmp_path):
    return create(tmp_path / "r", RECIPE, {"python": "3"})


def test_a_new_run_says_what_it_is_and_where_it_runs(tmp_path):
    create(tmp_path / "deep" / "r", RECIPE, environment())
    run = open_run(tmp_path / "deep" / "r")
    assert run.config(GroupRL) == RECIPE
    assert run.environment() == environment()
    assert {"rung", "noise_law", "python", "torch", "torch_build", "cpu", "capability", "threads"} <= set(environment())


def test_a_folder_in_use_is_not_overwritten_and_an_empty_one_is_taken(tmp_path):
    (tmp_path / "r").mkdir()
    create(tmp_path / "r", RECIPE, {})
    with pytest.raises(RunError, match="exists already: resume it, choose another name"):
        create(tmp_path / "r", RECIPE, {})
    assert [p.name for p in tmp_path.iterdir()] == ["r"]  # nothing left aside


def test_a_run_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(RunError, match="could not be made"):
        create(tmp_path / ("n" * 300), RECIPE, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "VERSION").write_text("rung-run 2\n"), "was written in the format 'rung-run 2'.*reads 'rung-"),
        (lambda f: (f / "VERSION").write_bytes(b"\xff\x00"), "was written in the format"),
        (lambda f: (f / "VERSION").unlink(), "is not a run folder"),
    ],
)
def test_a_folder_of_another_version_is_refused(run, change, message):
    change(run.folder)
    with pytest.raises(RunError, match=message):
        open_run(run.folder)


def test_a_configuration_of_another_schema_is_refused(run):
    path = run.folder / "config.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 9'))
    with pytest.raises(RunError, match=r"config\.json: this version of Rung reads schema 1.* has schema 9"):
        open_run(run.folder).config(GroupRL)


def test_no_folder_and_a_file_are_not_runs(tmp_path):
    (tmp_path / "file").touch()
    for name in ("absent", "file"):
        with pytest.raises(RunError, match="is not a run folder"):
            open_run(tmp_path / name)


RECORDS = st.lists(
    st.fixed_dictionaries({"step": st.integers(0, 9), "text": st.text(st.characters()), "x": st.floats(-1e9, 1e9)}),
    max_size=8,
)


@given(RECORDS)
def test_records_come_back_as_they_went_in(tmp_path_factory, records):
    """Texts hold newlines, NULs, U+2028 and lone surrogates: one record stays one line."""
    run = RunDir(tmp_path_factory.mktemp("r"))
    run.append("samples", records[:3])
    run.append("samples", records[3:])
    assert run.read("samples") == records


def test_a_number_that_is_not_finite_is_written_as_null_at_any_depth(run):
    run.append("metrics", [{"step": 1, "a": math.nan, "b": {"c": [1.0, -math.inf]}}])
    assert run.read("metrics") == [{"step": 1, "a": None, "b": {"c": [1.0, None]}}]


@pytest.mark.parametrize("torn", [b"{", b'{"step": 3, "text": "half', b'{"step": 3}', b"\0" * 9000, b"x" * 5000])
def test_a_torn_last_line_is_ignored_and_the_next_append_removes_it(run, torn):
    """Even a line that lacks only its newline: a reader and the next writer agree that it never happened."""
    run.append("metrics", [{"step": 1}, {"step": 2}])
    with open(run.folder / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert run.read("metrics") == [{"step": 1}, {"step": 2}]
    run.append("metrics", [{"step": 9}])
    assert run.read("metrics") == [{"step": 1}, {"step": 2}, {"step": 9}]


def test_a_log_that_is_one_torn_line_starts_afresh(run):
    (run.folder / "metrics.jsonl").write_bytes(b"z" * 10_000)
    assert run.read("metrics") == []
    run.append("metrics", [{"step": 1}])
    assert (run.folder / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_a_broken_line_in_the_middle_is_named(run):
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2 is not a JSON record"):
        run.read("metrics")


def test_a_cut_removes_the_step_and_what_is_later_and_leaves_the_other_bytes(run):
    path = run.folder / "samples.jsonl"
    path.write_bytes(b'{"step":1,  "odd spacing": 1}\n{"step": 2}\n{"step": 2, "x": 1}\n{"step": 3}\n{"torn')
    assert run.cut("samples", 2) == 3
    assert path.read_bytes() == b'{"step":1,  "odd spacing": 1}\n'
    assert run.cut("samples", 2) == 0
    assert run.cut("evals", 0) == 0  # never written
    assert not list(run.folder.glob(".tmp*"))


def test_a_full_disk_is_an_error_of_the_run_and_the_log_stays_readable(run):
    run.append("metrics", [{"step": 1}])
    code = f"""
import resource
from pathlib import Path
from rung.core.errors import RunError
from rung.core.rundir import RunDir
run = RunDir(Path({str(run.folder)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    run.append("metrics", [{{"step": 2, "x": "y" * 500}}])  # 21 bytes around the text
except RunError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "metrics.jsonl could not take 521 bytes: File too large" in out
    assert (run.folder / "metrics.jsonl").stat().st_size == 100  # part of the line did get there
    assert run.read("metrics") == [{"step": 1}]
    run.append("metrics", [{"step": 3}])
    assert run.read("metrics") == [{"step": 1}, {"step": 3}]


def test_replacing_a_file_leaves_the_old_one_where_the_new_one_fails(tmp_path):
    write_atomic(tmp_path / "a", b"old")

    def parts():
        yield b"new"
        raise OSError("disk")

    with pytest.raises(RunError, match=r"/a could not be written \(disk\): make room"):
        write_atomic(tmp_path / "a", parts())
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


HOLD = """
import sys, time
from pathlib import Path
from rung.core.rundir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_kill_9_gives_the_lock_back(run):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.folder)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"locked\n"
        assert run.owner() == holder.pid
        with pytest.raises(RunError, match=f"is in use by process {holder.pid}: wait for it to end"), run.lock():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert run.owner() is None
        with run.lock():
            assert run.owner() == os.getpid()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert run.owner() is None


def test_a_child_that_outlives_its_parent_does_not_hold_the_lock(run):
    """The grading child is such a child: it must not inherit the lock's descriptor."""
    with run.lock():
        child = subprocess.Popen(["sleep", "60"])
    try:
        assert run.owner() is None
    finally:
        child.kill()
        child.wait()


def test_asking_for_the_owner_never_makes_a_writer_fail(run):
    """A reader holds the lock for an instant; the writer waits that long."""
    ask = "import sys, time\nfrom pathlib import Path\nfrom rung.core.rundir import RunDir\n"
    ask += "print(1, flush=True)\nend = time.time() + 1\nwhile time.time() < end: RunDir(Path(sys.argv[1])).owner()"
    asker = subprocess.Popen([sys.executable, "-c", ask, str(run.folder)], stdout=subprocess.PIPE)
    with run.lock():
        pass
    asker.stdout.readline()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        with run.lock():
            pass
    assert asker.wait() == 0
    asker.stdout.close()


KEY = GradeKey(step=4, problem="p", draw=1, sample=3)


def test_the_journal_replays_every_field_of_a_grade(run):
    grades = [Grade(score=0.1, right=False, parts={"equal": 1.0}), Grade(score=1.0, right=True), unknown("lost")]
    keys = [GradeKey(step=4, problem="p", draw=1, sample=i) for i in range(3)]
    GradeJournal(run).write(zip(keys, [(1, 2)] * 3, grades, strict=True))
    GradeJournal(run).write([(GradeKey(step=5, problem="p", draw=0, sample=0), (1,), grades[0])])
    again = GradeJournal(run)
    assert [again.lookup(key, [1, 2]) for key in keys] == grades


def test_a_grade_is_found_only_by_its_whole_key_and_its_tokens(run):
    journal = GradeJournal(run)
    journal.write([(KEY, (1, 23), Grade(score=1.0))])
    for found in (journal, GradeJournal(run)):
        assert found.lookup(KEY, (1, 23)) == Grade(score=1.0)
        assert found.lookup(KEY, (12, 3)) is None
        assert found.lookup(KEY, (1, 23, 0)) is None
        for name, other in {"step": 5, "problem": "q", "draw": 0, "sample": 2}.items():
            assert found.lookup(GradeKey(**{**vars(KEY), name: other}), (1, 23)) is None


def test_grades_are_on_disk_when_write_returns_and_old_ones_are_left_aside_on_resume(run):
    GradeJournal(run).write([(KEY, (1,), Grade(score=1.0))])
    assert [record["step"] for record in run.read("grades")] == [4]
    assert GradeJournal(run, since=4).lookup(KEY, (1,)) is not None
    assert GradeJournal(run, since=5).lookup(KEY, (1,)) is None


def test_unknown_grades_are_replayed_unless_the_verifier_stopped_the_run_in_their_step(run):
    """A mended verifier must get its chance; after `kill -9` the batch must be the one that it was."""
    later = GradeKey(step=5, problem="p", draw=1, sample=3)
    known = GradeKey(step=5, problem="p", draw=1, sample=4)
    GradeJournal(run).write([(KEY, (1,), unknown("a")), (later, (1,), unknown("b")), (known, (1,), Grade(score=0.5))])
    assert GradeJournal(run).lookup(later, (1,)) == unknown("b")
    GradeJournal(run).stop(5)
    again = GradeJournal(run)
    assert [again.lookup(key, (1,)) for key in (KEY, later, known)] == [unknown("a"), None, Grade(score=0.5)]
    again.write([(later, (1,), unknown("still"))])
    assert GradeJournal(run).lookup(later, (1,)) == unknown("still"), "what was said after the stop is replayed"


def test_a_journal_with_a_torn_last_grade_keeps_the_others(run):
    GradeJournal(run).write(
        [(KEY, (1,), Grade(score=1.0)), (GradeKey(**{**vars(KEY), "sample": 4}), (1,), Grade(score=0.0))]
    )
    path = run.folder / "grades.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert GradeJournal(run).lookup(KEY, (1,)) == Grade(score=1.0)
    assert json.loads(path.read_bytes().splitlines()[0])["problem"] == "p"
