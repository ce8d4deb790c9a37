"""The command line from outside: exit codes, streams, and what it says to each kind of mistake."""

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from made_runs import RECIPE, finished_run

import rung
from rung.cli import main as cli
from rung.core.errors import ConfigError, ModelError
from rung.core.rundir import create
from rung.train.config import TaskSpec

VERBS = list(cli.VERBS)


def run(capsys, *words):
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_without_words_and_with_help_all_verbs_are_listed(capsys):
    for words in ((), ("--help",), ("-h",), ("help",)):
        code, out, _ = run(capsys, *words)
        assert code == 0
        assert all(f"  {verb} " in out for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "rung has no verb 'trian'. Did you mean `rung train`?"),
        (["xyzzy"], f"rung has no verb 'xyzzy'. Known: {', '.join(VERBS)}."),
        (
            ["generate", "m", "p", "--max-token", "3"],
            "rung generate has no option --max-token. Did you mean --max-tokens?",
        ),
        (["generate", "m"], "rung generate needs PROMPT.... See `rung generate --help`."),
        (
            ["generate", "m", "p", "--dtype", "fp23"],
            "--dtype needs one of auto, bf16, fp32, got 'fp23'. Did you mean 'fp32'?",
        ),
        (["eval", "m"], "rung eval needs MODEL and TASK as its first words. See `rung eval --help`."),
        (["eval", "m", "arithmetic", "--task.options.digit", "3"], "Did you mean --task.options.digits?"),
        (["resume", "x", "--allow-change"], "rung resume has no option --allow-change. Did you mean --allow-changed?"),
        (["models", "x"], "rung models takes no further argument, got 'x'. See `rung models --help`."),
    ],
)
def test_what_is_not_understood_ends_with_code_2_and_one_line(capsys, words, message):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith(message + "\n")
    assert err.count("\n") == 1


def test_a_task_and_a_run_that_are_not_there_are_named(capsys, tmp_path):
    code, _, err = run(capsys, "eval", "m", "arithmetics")
    assert code == 1
    assert "Did you mean 'arithmetic'?" in err
    code, _, err = run(capsys, "report", str(tmp_path))
    assert code == 1
    assert "is not a run folder" in err


def failing(error):
    def verb(args):
        raise error

    return SimpleNamespace(run=verb)


def test_errors_meant_for_a_person_are_one_line_and_others_keep_their_traceback(capsys, monkeypatch):
    monkeypatch.setattr(cli, "import_module", lambda name: failing(ModelError("no \x1b[31mweights")))
    assert run(capsys, "models") == (1, "", "error: no ␛[31mweights\n")
    monkeypatch.setattr(cli, "import_module", lambda name: failing(ConfigError("what?")))
    assert run(capsys, "models") == (2, "", "error: what?\n")
    monkeypatch.setenv("RUNG_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        cli.main(["models"])
    monkeypatch.delenv("RUNG_TRACEBACK")
    monkeypatch.setattr(cli, "import_module", lambda name: failing(KeyError("a bug")))
    with pytest.raises(KeyError):
        cli.main(["models"])


def test_ctrl_c_ends_with_code_130(capsys, monkeypatch):
    monkeypatch.setattr(cli, "import_module", lambda name: failing(KeyboardInterrupt()))
    assert run(capsys, "models")[0] == 130


def python(code, **options):
    environment = os.environ | {"PYTHONPATH": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, **options)


def test_help_loads_no_heavy_package():
    code = "import sys; from rung.cli.main import main; main(sys.argv[1:]); print(sorted(sys.modules), file=sys.stderr)"
    for words in ([], *([verb, "--help"] for verb in VERBS if verb != "resume")):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        heavy = [name for name in ("torch", "numpy", "jinja2", "rich", "tokenizers") if f"'{name}'" in done.stderr]
        assert heavy == [], words


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from rung.cli.main import main; sys.exit(main(['--help']))"
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == ""


class FakeModels:
    """Stands for `rung.load` and `rung.generate`, and keeps what they were asked."""

    def __init__(self, text):
        self.text, self.asked = text, []

    def load(self, name, **options):
        self.asked.append(("load", name, options["dtype"]))
        return "a model"

    def generate(self, model, prompts, **options):
        self.asked.append((model, prompts, options))
        return [SimpleNamespace(text=self.text) for _ in prompts]


def test_generate_puts_the_texts_alone_on_stdout(capsys, monkeypatch):
    fake = FakeModels("42\x1b[2J")
    monkeypatch.setattr(rung, "load", fake.load, raising=False)
    monkeypatch.setattr(rung, "generate", fake.generate, raising=False)
    words = ["m", "one", "two", "--max-tokens", "5", "--temperature", "0.5", "--seed", "7", "--dtype", "fp32", "--raw"]
    code, out, _ = run(capsys, "generate", *words)
    assert (code, out) == (0, "42\x1b[2J\n42\x1b[2J\n")  # to a file or a pipe, byte for byte
    assert fake.asked[0] == ("load", "m", "fp32")
    model, prompts, options = fake.asked[1]
    assert (model, prompts) == ("a model", ["one", "two"])
    assert options == {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 7,
        "chat": False,
    }
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(capsys, "generate", "m", "one")[1] == "42␛[2J\n"


def test_eval_asks_the_task_that_was_named_and_prints_one_line(capsys, monkeypatch):
    asked = []

    def evaluate(model, task, **options):
        asked.append((model, task, options))
        return SimpleNamespace(accuracy=0.25, low=0.125, high=0.5, n=8, unknown=2)

    monkeypatch.setattr(rung, "load", FakeModels("").load, raising=False)
    monkeypatch.setattr(rung, "evaluate", evaluate, raising=False)
    words = ["--problems", "10", "--task.options.digits", "3", "--split", "validation", "--max-tokens", "9"]
    code, out, _ = run(capsys, "eval", "m", "arithmetic", *words)
    assert (code, out) == (0, "accuracy 25.0%  (95 % interval 12.5% to 50.0%, 8 problems, 2 more of unknown grade)\n")
    ((model, task, options),) = asked
    assert (model, task) == ("a model", TaskSpec(name="arithmetic", options={"digits": 3}))  # and no other option
    assert (options["problems"], options["split"], options["max_tokens"]) == (10, "validation", 9)


def test_chat_keeps_the_conversation_and_puts_answers_alone_on_stdout(capsys, monkeypatch):
    heard = []

    def stream(model, messages, **options):
        heard.append(([(m.role, m.content) for m in messages], options["seed"]))
        yield from ("an", "swer\x07")

    monkeypatch.setattr(rung, "load", FakeModels("").load, raising=False)
    monkeypatch.setattr("rung.model.generate.stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nnever said\n"))
    code, out, _ = run(capsys, "chat", "m", "--system", "be brief")
    assert (code, out) == (0, "answer\x07\nanswer\x07\n")
    first = [("system", "be brief"), ("user", "one")]
    assert [said for said, _ in heard] == [first, [*first, ("assistant", "answer\x07"), ("user", "two")]]
    assert heard[0][1] != heard[1][1]  # another draw for another turn


class Keyboard(io.StringIO):
    """A terminal's input whose last key is Ctrl-C."""

    def isatty(self):
        return True

    def readline(self):
        line = super().readline()
        if not line:
            raise KeyboardInterrupt
        return line


def test_chat_on_a_terminal_leaves_cleanly_and_shows_control_characters(capsys, monkeypatch):
    def stream(model, messages, **options):
        yield "wait\x1b]0;title\x07"
        if messages[-1].content == "stop":
            raise KeyboardInterrupt

    monkeypatch.setattr(rung, "load", FakeModels("").load, raising=False)
    monkeypatch.setattr("rung.model.generate.stream", stream)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = "wait␛]0;title␇\n"
    for typed, answers, said in (("one\nstop\n", 2, "> > Stopped.\n"), ("one\n", 1, "> > \nStopped.\n")):
        monkeypatch.setattr("sys.stdin", Keyboard(typed))
        assert run(capsys, "chat", "m") == (cli.INTERRUPTED, shown * answers, said)
    keyboard = io.StringIO("one\n")
    keyboard.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", keyboard)
    assert run(capsys, "chat", "m") == (0, shown, "> > \n")  # the end of input


def test_runs_lists_every_folder_with_its_state(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "No runs in runs/" in run(capsys, "runs")[1]
    finished_run(tmp_path / "runs" / "one")
    create(tmp_path / "runs" / "two", RECIPE, {})
    other = create(tmp_path / "runs" / "three", RECIPE, {})
    (other.folder / "VERSION").write_text("rung-run 99\n")
    lines = run(capsys, "runs")[1].splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["one", "finished"], ["three", "another"], ["two", "stopped"]]
    assert "60/60" in lines[1]
    assert "12.4% → 97.4%" in lines[1]


def test_a_folder_s_name_cannot_steer_the_terminal(capsys, tmp_path, monkeypatch):
    run_of = finished_run(tmp_path / "good\x1b[2J", steps=3)
    other = create(tmp_path / "bad\x1b[2J\n", RECIPE, {})
    (other.folder / "VERSION").write_text("rung-run 99\n")
    out = run(capsys, "runs", "--folder", str(tmp_path))[1]
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["bad␛[2J␊", "good␛[2J"]
    path = str(run_of.folder / "report.html")
    assert run(capsys, "report", str(run_of.folder))[1] == path + "\n"  # to a file or a pipe, byte for byte
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(capsys, "report", str(run_of.folder))[1] == path.replace("\x1b", "␛") + "\n"


def test_a_run_that_is_being_written_is_running(capsys, tmp_path):
    done = finished_run(tmp_path / "one")
    with done.lock():
        assert "running" in run(capsys, "runs", "--folder", str(tmp_path))[1]


def test_report_prints_where_it_lies(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path / "runs" / "one", steps=3)
    code, out, _ = run(capsys, "report", "one")
    assert (code, out) == (0, "runs/one/report.html\n")
    assert (tmp_path / "runs/one/report.html").stat().st_size > 10_000
