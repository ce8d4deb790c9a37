"""What the grading child may do, and what is left when it is gone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rung.core.errors import ConfigError
from rung.core.words import Answer
from rung.tasks.load import load_task
from rung.tasks.sandbox import Grader, Limits, isolation, lacking

VERIFIER = """
import errno, os, socket, sys, time
from rung.core.words import Grade

problems = [{"prompt": "a", "answer": "fine"}]
LOADED_IN = os.getcwd()

def grade(**parts):
    return Grade(score=1.0, right=True, parts=parts)

def reward(problem, text):
    match text:
        case "environment":
            kept = {"PATH", "HOME", "TMPDIR", "PYTHONHASHSEED", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH"}
            kept |= {"LANG", "LC_ALL", "LC_CTYPE"}
            strange = [name for name in os.environ if name not in kept and not name.endswith("_NUM_THREADS")]
            home = os.getcwd() == os.environ["HOME"] == os.environ["TMPDIR"]
            return grade(strange=len(strange), home=home, loaded=LOADED_IN != os.getcwd())
        case "network":
            with socket.socket() as connection:
                connection.settimeout(1)
                port = int(open(os.path.dirname(__file__) + "/port").read())
                return grade(errno=connection.connect_ex(("127.0.0.1", port)))
        case "write here":
            open("mine", "w").write("x")
            return grade(size=os.stat("mine").st_size)
        case "write there":
            open(os.path.dirname(__file__) + "/theirs", "w").write("x")
        case "large file":
            with open("large", "wb") as file:
                for _ in range(100): file.write(bytes(1 << 20))
        case "many processes":
            children = 0
            try:
                while children < 200:
                    if not os.fork():
                        time.sleep(60); os._exit(0)
                    children += 1
            except OSError as error:
                return grade(children=children, again=error.errno == errno.EAGAIN)
        case "fork bomb":
            while True:
                try: os.fork()
                except OSError: pass
        case "leave behind":
            if not os.fork():
                os.setsid()
                if not os.fork():
                    os.close(0); os.close(1); os.close(2)
                    while True: time.sleep(0.1)
                os._exit(0)
            return grade()
        case "others":
            return grade(number=sum(name.isdigit() for name in os.listdir("/proc")), user=os.getuid())
        case "read root":
            return grade(read=len(open(os.path.dirname(__file__) + "/closed").read()))
    return text == problem.answer
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "verifier.py").write_text(VERIFIER)
    return f"{tmp_path / 'verifier.py'}:reward"


def ask(place, *texts):
    problem = load_task(place, {}).problem(0)
    return [Answer(problem=problem, text=text, stop="eos", num_tokens=1) for text in texts]


def parts(place, text, **limits):
    with Grader(place, {}, Limits(**limits)) as grader:
        (grade,) = grader.grade(ask(place, text))
    assert grade.known, grade.error
    assert grade.right, grade.error
    return grade.parts


CONFINED = isolation(Limits())
apart = pytest.mark.skipif("network none" not in CONFINED, reason="this kernel allows no namespaces of our own")
limited = pytest.mark.skipif("not limited" in CONFINED, reason="the number of processes cannot be limited here")


def alive(mark):
    """Processes that were started with this text among their words."""
    found = []
    for words in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in words.read_bytes() and int(words.parent.name) != os.getpid():
                state = (words.parent / "stat").read_text().rpartition(")")[2].split()[0]
                found += [words.parent.name] if state not in "ZX" else []
        except OSError:  # it has just ended
            continue
    return found


def test_the_environment_is_empty_and_the_folder_a_temporary_one_that_goes_away(place, monkeypatch):
    monkeypatch.setenv("RUNG_TEST_SECRET", "s3cret")
    before = set(Path("/tmp").glob("rung-grading-*"))
    assert parts(place, "environment") == {"strange": 0.0, "home": 1.0, "loaded": 1.0}
    assert set(Path("/tmp").glob("rung-grading-*")) <= before


@apart
def test_there_is_no_network_unless_it_is_asked_for(place, tmp_path):
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        (tmp_path / "port").write_text(str(server.getsockname()[1]))
        assert parts(place, "network")["errno"] != 0.0
        assert parts(place, "network", network=True)["errno"] == 0.0


@apart
def test_files_can_be_written_in_the_temporary_folder_alone_unless_it_is_asked_for(place, tmp_path):
    assert parts(place, "write here") == {"size": 1.0}
    with Grader(place, {}) as grader:
        (there,) = grader.grade(ask(place, "write there"))
    assert "Read-only file system" in there.error
    assert not (tmp_path / "theirs").exists()
    with Grader(place, {}, Limits(writable=True)) as grader:
        grader.grade(ask(place, "write there"))
    assert (tmp_path / "theirs").read_text() == "x"


def test_a_file_has_a_largest_size(place):
    with Grader(place, {}, Limits(file_bytes=1 << 20)) as grader:
        large, fine = grader.grade(ask(place, "large file", "fine"))
    assert (large.score, fine.score) == (0.0, 1.0)
    assert "File too large" in large.error or "No space left" in large.error


@limited
def test_the_number_of_processes_is_limited_for_root_too(place):
    found = parts(place, "many processes", processes=20)
    assert found["again"]
    assert 10 <= found["children"] <= 24


@limited
def test_a_fork_bomb_is_wrong_leaves_nothing_behind_and_the_next_answer_is_graded(place):
    mark = "1.0078125"  # a number of seconds that nobody else has asked for
    began = time.monotonic()
    with Grader(place, {}, Limits(seconds=float(mark), processes=20)) as grader:
        bomb, fine = grader.grade(ask(place, "fork bomb", "fine"))
        assert alive(mark)
    assert (bomb.score, fine.score) == (0.0, 1.0)
    assert "took more than 1.00781 seconds" in bomb.error
    assert not alive(mark)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_what_left_its_session_ends_with_the_child(place, how):
    mark = {"closed": "61.0078125", "killed": "61.0234375"}[how]
    grader = Grader(place, {}, Limits(seconds=float(mark)))
    assert grader.grade(ask(place, "leave behind"))[0].right
    if how == "killed":
        grader._child._process.kill()
        end = time.monotonic() + 10
        while alive(mark) and time.monotonic() < end:
            time.sleep(0.02)
    grader.close()
    assert not alive(mark)


@apart
def test_other_processes_are_out_of_sight_and_root_is_nobody_who_can_read(place, tmp_path):
    (tmp_path / "closed").write_text("abc")
    (tmp_path / "closed").chmod(0o600)
    assert parts(place, "read root") == {"read": 3.0}
    found = parts(place, "others")
    assert found["user"] != 0.0
    if "others hidden" in CONFINED:
        assert found["number"] <= 4


UNCONFINED = """
import json, os, sys, time
from rung.tasks import confine
if sys.argv[1] == "no namespaces":
    confine._possible = lambda action: False
else:
    os.setgroups([]); os.setgid(54321); os.setuid(54321)
    confine._call("prctl", 4, 1, 0, 0, 0)  # as in a process that was this user's from its start: /proc/self is its own
limits = {"memory_bytes": 1 << 30, "file_bytes": 1 << 20, "processes": 20, "network": False, "writable": False}
facts = confine.confine(limits, sys.argv[2])
children = 0
try:
    while children < 60:
        if not os.fork():
            os.setsid()
            time.sleep(300)
        children += 1
except OSError:
    pass
print(json.dumps({**facts, "children": children}), flush=True)
os._exit(7)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("how", ["no namespaces", "no root"])
def test_where_less_is_allowed_the_rest_still_holds_and_the_facts_say_what_is_missing(how, tmp_path):
    import json

    process = subprocess.Popen(
        [sys.executable, "-c", UNCONFINED, how, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    facts = json.loads(process.stdout.readline())
    assert process.wait(20) == 7  # before stdin is let go of, which would end it first
    process.stdin.close()
    process.stdout.close()
    assert facts["network"] == ("open" if how == "no namespaces" else "none")
    assert facts["processes"] == "at most 20"
    assert 10 <= facts["children"] <= 24
    assert not alive(str(tmp_path))


def test_what_is_missing_is_said_in_a_sentence():
    whole = {"processes": "at most 64", "network": "none", "files": "read-only", "others": "hidden"}
    assert lacking(whole, Limits()) == ""
    assert "(network open, files writable)" in lacking({**whole, "network": "open", "files": "writable"}, Limits())
    assert lacking({**whole, "network": "open"}, Limits(network=True)) == ""


def test_a_limit_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"grading\.seconds must be positive, and is 0\.0"):
        Limits(seconds=0.0)


def test_a_relative_name_is_read_where_the_parent_stands(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Grader("verifier.py:reward", {}) as grader:
        assert grader.grade(ask(place, "fine"))[0].right
