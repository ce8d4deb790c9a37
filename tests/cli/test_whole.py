"""The command line as a person meets it: a real (tiny) model, nothing replaced."""

import os
import re
import signal
import subprocess
import sys

import pytest
from train.tiny import tiny_folder, tiny_recipe

from rung.cli.main import main
from rung.core.config import dumps_json

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
NUM_STEPS = 40  # long enough to be interrupted, whatever the machine does beside


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    recipe = tiny_recipe(tiny_folder(folder / "model"), num_steps=NUM_STEPS, checkpoint_every=1000, eval_every=0)
    (folder / "recipe.json").write_text(dumps_json(recipe))
    return folder


@pytest.fixture
def typed(here, capsys, monkeypatch):
    """What a command prints and how it ends, in this process: torch takes seconds to load."""
    monkeypatch.chdir(here)

    def run(*words):
        code = main(words)
        return code, *capsys.readouterr()

    return run


def test_ctrl_c_saves_the_step_says_how_to_go_on_and_what_it_says_works(here, typed):
    process = subprocess.Popen(
        [sys.executable, "-m", "rung.cli.main", "train", "recipe.json"],
        cwd=here,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("training "):
            os.killpg(process.pid, signal.SIGINT)
            break
    out, rest = process.communicate()
    said = "".join(said) + rest
    assert (process.returncode, out) == (130, "")
    assert "Stopping after this step" in said
    assert "Traceback" not in said
    go_on = re.search(r"^To go on: rung (.*)$", said, re.MULTILINE)[1]
    saved = [int(folder.name.removeprefix("step-")) for folder in (here / "runs/tiny/checkpoints").iterdir()]
    assert len(saved) == 1  # no checkpoint was due: this one is Ctrl-C's
    assert 0 < saved[0] < NUM_STEPS

    code, out, said = typed(*go_on.split())
    assert code == 0, said
    assert f"resumed from step {saved[0]}" in said
    assert re.match(rf"tiny: finished: {NUM_STEPS} steps; held-out accuracy ", out)
    assert "report: runs/tiny/report.html" in out
    assert "\x1b" not in said + out  # no colours in a pipe

    code, again, said = typed("train", "recipe.json", "--or-resume")
    assert (code, again) == (0, out)
    assert "training " not in said
    code, _, said = typed("train", "recipe.json")
    assert code == 1
    assert re.match(r"error: .*runs/tiny.*exists", said)
    code, _, said = typed("train", "recipe.json", "--seed", "1", "--or-resume")
    assert code == 1
    assert "--name" in said


def test_a_text_and_an_accuracy_come_out_of_a_folder(typed):
    words = ("generate", "model", "say a", "--max-tokens", "4", "--seed", "3")
    code, text, said = typed(*words)
    assert (code, text[-1:]) == (0, "\n"), said
    assert typed(*words)[1] == text
    _, accuracy, said = typed("eval", "model", "letters.py:reward", "--problems", "5", "--max-tokens", "3")
    assert re.fullmatch(r"accuracy \d+\.\d%  \(95 % interval .*, 5 problems\)\n", accuracy), said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["generate", "smollm2-135"], 2, "needs PROMPT"),
        (["generate", "smollm2-135", "hi"], 1, "Did you mean 'smollm2-135m'?"),
        (["generate", "empty", "hi"], 1, "empty"),
        (["generate", "model", "long " * 200], 1, "256"),  # the context
        (["eval", "model", "letters.py:reward", "--problems", "0"], 2, "problems must be at least 1, not 0"),
        (["resume", "nowhere"], 1, "nowhere is not a run folder"),
        (["train", "recipe.json", "--name", "x", "--num-steps", "0"], 2, "num_steps must be at least 1, not 0"),
        (["train", "recipe.json", "--name", "x", "--top-k", "5"], 2, "top_k = 5 is refused in RL"),
        (["train", "recipe.json", "--name", "x", "--task.name", "raises.py:task"], 1, "ZeroDivisionError"),
        (["train", "recipe.json", "--name", "x", "--task.name", "raises.py:none"], 1, "has no problems"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(typed, here, words, code, message):
    (here / "empty").mkdir(exist_ok=True)
    (here / "raises.py").write_text("problems = []\ndef task(): 1 / 0\ndef none(problem, text): return 1\n")
    ended, out, err = typed(*words)
    assert (ended, out) == (code, ""), err
    assert re.search(f"^error: .*{re.escape(message)}.*\\n\\Z", err, re.MULTILINE)
    assert not (here / "runs" / "x").exists()
