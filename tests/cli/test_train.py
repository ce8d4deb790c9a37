"""`rung train`: from words to the one call of `rung.train`, and what is said at the end."""

import json
import shlex
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from made_runs import RECIPE, eval_row, finished_run

import rung
from rung.cli import main as cli
from rung.cli.train import load_recipe, read, recipes
from rung.core.config import dumps_json
from rung.core.errors import ConfigError
from rung.core.progress import Progress
from rung.core.rundir import RunDir, create
from rung.report import page
from rung.report.load import read_run
from rung.train.config import METHODS, GroupRL, TaskSpec

FILE = """
from rung.train.config import GroupRL, TaskSpec

def mine(digits: int = 3) -> GroupRL:
    return GroupRL(name="mine", task=TaskSpec(name="arithmetic", options={"digits": digits}), num_steps=7)

def other():
    return GroupRL(name="other", task=TaskSpec(name="arithmetic"))

def needs(argument):
    return None

def number():
    return 3

def broken():
    raise KeyError("secret")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a file of recipes, and nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path


def refused(words):
    with pytest.raises(ConfigError) as caught:
        read(words.split())
    return str(caught.value)


def test_options_reach_every_part_of_a_recipe(here):
    words = (
        "mine.py:mine --num-steps 9 --optim.lr 3e-4 --method.kl k3_loss --method.kl-coef 0.1 "
        "--task.options.digits 1 --task.options.operations +- --no-share-prompts --name x --folder f"
    )
    asked, recipe = read(words.split())
    assert asked.folder == "f"
    assert (recipe.num_steps, recipe.optim.lr, recipe.share_prompts, recipe.name) == (9, 3e-4, False, "x")
    assert (recipe.method.kl, recipe.method.kl_coef) == ("k3_loss", 0.1)
    assert recipe.task.options == {"digits": 1, "operations": "+-"}


def test_a_preset_fills_all_cells_and_a_cell_can_still_be_replaced_before_or_after_it(here):
    for words in ("--method dapo --method.eps-low 0.1", "--method.eps-low 0.1 --method dapo"):
        _, recipe = read(["mine.py:mine", *words.split()])
        assert recipe.method == replace(METHODS["dapo"], eps_low=0.1)


def test_another_task_brings_its_own_options_and_none_of_the_old(here):
    (here / "task.py").write_text(
        "class Words:\n    def __init__(self, size: int = 4, label: str = 'a'):\n        pass\n"
        "def reward(problem, text, bonus=1.5): return 1\n"
    )
    _, recipe = read(["mine.py:mine", "--task.name", "task.py:Words", "--task.options.size", "5"])
    assert recipe.task.options == {"size": 5}
    _, recipe = read(["mine.py:mine", "--task.name=task.py:reward", "--task.options.bonus", "2"])
    assert recipe.task.options == {"bonus": 2.0}
    assert "Did you mean" in refused("mine.py:mine --task.name task.py:Words --task.options.sise 5")
    assert "no option --task.options.digits" in refused(
        "mine.py:mine --task.name task.py:Words --task.options.digits 5"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "rung train needs a recipe as its first word. Known: "),
        ("--seed 3", "rung train needs a recipe as its first word. Known: "),
        ("arithmetics", "there is no recipe 'arithmetics'. Did you mean 'arithmetic'?"),
        ("mine.py:nine", "mine.py has no recipe 'nine'. Did you mean 'mine'?"),
        ("mine.py:needs", "mine.py has no recipe 'needs'."),
        ("mine.py:number", "the recipe mine.py:number must return a GroupRL"),
        ("mine.py:broken", "the recipe mine.py:broken raised KeyError: 'secret'"),
        ("nowhere.py:x", "there is no recipe file nowhere.py."),
        ("no.such.module:x", "the recipes of no.such.module cannot be read: ModuleNotFoundError"),
        ("nowhere.toml", "nowhere.toml cannot be read: No such file or directory"),
        (
            "arithmetic --task.name mixture --task.options.sums.task guess --task.options.sums.guess 3",
            "has no option --task.options.sums.guess. Did you mean --task.options.sums.guesses?",
        ),
        ("mine.py:mine --num-step 3", "rung train mine.py:mine has no option --num-step. Did you mean --num-steps?"),
        ("mine.py:mine --lr 3", "rung train mine.py:mine has no option --lr. Did you mean --optim.lr?"),
        ("mine.py:mine --kl none", "no option --kl. Did you mean --method.kl?"),  # spelt, --model is nearer
        ("mine.py:mine --method.kl_coef 3", "no option --method.kl_coef. Did you mean --method.kl-coef?"),
        ("mine.py:mine --method drgrpo", "got 'drgrpo'. Did you mean 'dr_grpo'?"),
        ("mine.py:mine --method.kl k3", "--method.kl needs one of none, k1_reward, square, k3_loss, got 'k3'."),
        ("mine.py:mine --task.options.digit 3", "no option --task.options.digit. Did you mean --task.options.digits?"),
        ("mine.py:mine arithmetic", "takes no further argument, got 'arithmetic'."),
    ],
)
def test_every_kind_of_unknown_name_is_answered_with_the_nearest(here, words, message):
    assert message in refused(words)


def test_a_recipe_file_that_raises_says_what(here):
    (here / "bad.py").write_text("import nonsense_that_is_not_there\n")
    assert "bad.py cannot be read: ModuleNotFoundError" in refused("bad.py:x")
    (here / "worse.py").write_text("def x(:\n")
    assert "worse.py cannot be read: SyntaxError" in refused("worse.py:x")


def test_the_built_in_recipes_are_those_that_need_no_argument():
    assert "arithmetic" in recipes()
    for name in recipes():
        assert isinstance(load_recipe(name), GroupRL)


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_a_printed_configuration_repeats_the_run(here, capsys, suffix):
    words = [
        "mine.py:mine",
        "--method",
        "rloo",
        "--optim.lr",
        "0.00012345",
        "--task.options.operations",
        "+-",
        "--seed",
        "5",
    ]
    assert cli.main(["train", *words, "--print-config"]) == 0
    printed, said = capsys.readouterr()
    assert said == ""
    if suffix == "toml":
        printed = to_toml(json.loads(printed))
    (here / f"again.{suffix}").write_text(printed)
    _, recipe = read(words)
    _, again = read([f"again.{suffix}"])
    assert again == recipe
    _, changed = read([f"again.{suffix}", "--seed", "6"])
    assert changed == replace(recipe, seed=6)


def test_the_commands_of_a_report_are_understood_and_mean_the_run(here, capsys, monkeypatch):
    task = (
        "def __init__(self, lenient: bool = False, loud: bool = True, mark: str = '', size: int = 4, by_2: float = 1.0)"
    )
    header = "from rung.tasks.arithmetic import Arithmetic\nclass Words(Arithmetic):\n"
    (here / "task.py").write_text(f"{header}    {task}:\n        super().__init__()\n")
    options = {"lenient": True, "loud": False, "mark": "--a 'b' $c", "size": -3, "by_2": 1e-7}
    recipe = replace(load_recipe("mine.py:mine"), task=TaskSpec(name="task.py:Words", options=options))
    run = finished_run(here / "runs" / "my run", recipe.num_steps, recipe)
    evaluate, train = map(shlex.split, page._commands(read_run(run.folder)).splitlines())
    asked = []
    found = SimpleNamespace(accuracy=0.5, low=0.25, high=0.75, n=8, unknown=0)
    monkeypatch.setattr(rung, "load", lambda name, **_: asked.append(name), raising=False)
    monkeypatch.setattr(
        rung, "evaluate", lambda model, task, **more: asked.append((task, more)) or found, raising=False
    )
    assert cli.main(evaluate[1:]) == 0, capsys.readouterr().err
    model, (task, more) = asked
    assert (model, task) == (str(run.folder / "model"), recipe.task)
    assert (more["problems"], more["max_tokens"], more["split"]) == (
        recipe.eval_problems,
        recipe.max_tokens,
        "held_out",
    )
    assert read(train[2:])[1] == replace(recipe, name="mine-again")


def to_toml(value, path=""):
    """JSON's objects, numbers and plain strings as TOML tables."""
    plain = [f"{key} = {json.dumps(item)}" for key, item in value.items() if not isinstance(item, dict)]
    tables = [to_toml(item, f"{path}{key}.") for key, item in value.items() if isinstance(item, dict)]
    head = [f"[{path[:-1]}]"] if path else []
    return "\n".join([*head, *plain, *tables])


def test_a_configuration_file_with_an_unknown_name_is_refused_with_the_nearest(here):
    (here / "bad.toml").write_text('schema = 1\nname = "x"\nnum_step = 3\n[task]\nname = "arithmetic"\n')
    assert "bad.toml: num_step is unknown: GroupRL has no such field. Did you mean 'num_steps'?" in refused("bad.toml")


class FakeTrain:
    """Stands for `rung.train`: makes a finished run, tells some news, and keeps what it was asked."""

    def __init__(self, error=None):
        self.asked, self.error = [], error

    def __call__(self, recipe, *, folder, listener, or_resume):
        self.asked.append((recipe, str(folder), or_resume))
        if not (folder / "VERSION").exists():
            run = create(folder, recipe, {})
            run.append("metrics", [eval_row(0, 5, 50)])
            listener(Progress(stage="train", done=1, total=recipe.num_steps, metrics={"reward": 0.5}))
            if self.error:
                raise self.error
            run.append("metrics", [{"kind": "train", "step": s, "reward": 0.5} for s in range(1, recipe.num_steps + 1)])
            run.append("metrics", [eval_row(recipe.num_steps, 40, 50)])
            (folder / "model").mkdir()
        listener(Progress(stage="evaluate", done=50, total=50, metrics={"accuracy_held_out": 0.8}))


def test_train_is_one_call_and_tells_result_and_report_on_stdout(here, capsys, monkeypatch):
    fake = FakeTrain()
    monkeypatch.setattr(rung, "train", fake, raising=False)
    assert cli.main(["train", "mine.py:mine", "--or-resume"]) == 0
    out, err = capsys.readouterr()
    assert fake.asked == [(load_recipe("mine.py:mine"), "runs/mine", True)]
    assert out.splitlines() == [
        "mine: finished: 7 steps; held-out accuracy 10.0% → 80.0% (95 % interval 67.0% to 88.8%, 50 problems)",
        "model:  runs/mine/model",
        "report: runs/mine/report.html",
    ]
    assert "training 1/7  reward 0.5" in err
    assert (here / "runs/mine/report.html").exists()


def test_a_finished_run_tells_its_result_after_its_recipe_has_changed(here, capsys, monkeypatch):
    again = ["train", "arithmetic", "--or-resume", "--name", "kept"]
    old = replace(load_recipe("arithmetic"), name="kept", num_steps=3, seed=5)
    run = finished_run(here / "runs" / "kept", 3, old)
    (run.folder / "model").rmdir()
    calls = []
    monkeypatch.setattr(rung, "train", lambda recipe, **options: calls.append(recipe), raising=False)
    cli.main(again)
    assert len(calls) == 1, "a run without a model has not come to its end"
    (run.folder / "model").mkdir()
    assert cli.main([*again, "--seed", "5"]) == 0
    assert len(calls) == 1
    out, err = capsys.readouterr()
    assert "kept: finished: 3 steps; held-out accuracy 12.4% → 97.4%" in out
    assert "Recipes have changed since (num_steps); another --name trains anew." in err
    cli.main([*again, "--num-steps", "9"])  # what was typed is meant: `rung.train` refuses it
    cli.main([*again, "--method", "rloo", "--method.kl-coef", "0.5"])
    assert len(calls) == 3


def test_ctrl_c_says_how_to_go_on_and_ends_with_130(here, capsys, monkeypatch):
    monkeypatch.setattr(rung, "train", FakeTrain(KeyboardInterrupt()), raising=False)
    assert cli.main(["train", "mine.py:mine", "--folder", "my runs/a"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "To go on: rung resume 'my runs/a'" in err


def test_resume_is_one_call(here, capsys, monkeypatch):
    finished_run(here / "runs" / "one", steps=3)
    asked = []
    monkeypatch.setattr(
        rung, "resume", lambda folder, **options: asked.append((str(folder), options["allow_changed"])), raising=False
    )
    assert cli.main(["resume", "one", "--allow-changed"]) == 0
    assert asked == [("runs/one", True)]
    assert "report: runs/one/report.html" in capsys.readouterr().out


def test_dry_run_trains_nothing(here, capsys, monkeypatch):
    class Estimate:
        lines = ("memory 1 GB", "time 2 min")

    monkeypatch.setattr(rung, "estimate", lambda recipe: Estimate, raising=False)
    monkeypatch.setattr(rung, "train", None, raising=False)
    assert cli.main(["train", "mine.py:mine", "--dry-run"]) == 0
    assert capsys.readouterr().out == "memory 1 GB\ntime 2 min\n"
    assert not (here / "runs").exists()


def test_tensorboard_mirrors_every_metric_and_follows_a_cut_back_log(here, capsys, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(rung, "train", FakeTrain(), raising=False)
    assert cli.main(["train", "mine.py:mine", "--tensorboard"]) == 0
    looking = accumulator.EventAccumulator(str(here / "runs/mine/tensorboard"))

    def scalars(found=looking):
        found.Reload()
        return {tag: [(e.step, round(e.value, 6)) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}

    assert scalars()["train/reward"] == [(step, 0.5) for step in range(1, 8)]
    assert scalars()["eval/accuracy"] == [(0, 0.1), (7, 0.8)]

    def resume(folder, *, listener, **_):
        run = RunDir(folder)
        run.cut("metrics", 4)
        listener(Progress(stage="load"))
        run.append("metrics", [{"kind": "train", "step": step, "reward": 0.75} for step in (4, 5)])

    time.sleep(1.1)  # tensorboard orders its files by the second in which they were begun
    monkeypatch.setattr(rung, "resume", resume, raising=False)
    assert cli.main(["resume", "mine", "--tensorboard"]) == 0
    expected = [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.75), (5, 0.75)]
    assert scalars()["train/reward"] == expected, "to one who was looking"
    assert scalars(accumulator.EventAccumulator(looking.path))["train/reward"] == expected, "to one who comes now"


def test_tensorboard_that_is_not_installed_is_said_before_anything_is_done(here, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(rung, "train", FakeTrain(), raising=False)
    assert cli.main(["train", "mine.py:mine", "--tensorboard"]) == 2
    assert "--tensorboard needs the package tensorboard: pip install 'rung[tensorboard]'." in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_print_config_writes_what_a_run_folder_holds(here, capsys):
    cli.main(["train", "mine.py:mine", "--print-config"])
    run = create(here / "runs" / "x", load_recipe("mine.py:mine"), {})
    assert (
        (run.folder / "config.json").read_text() == capsys.readouterr().out == dumps_json(load_recipe("mine.py:mine"))
    )
    assert load_recipe("mine.py:mine") != RECIPE


QUESTIONS = "\n".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) for n in range(40))
REWARD = """
def f(prompts, completions, **columns):
    return [0.0 for _ in completions]

def g(problem, text):
    return 1
"""


def test_data_and_rewards_of_the_users_own_take_the_place_of_the_recipes_task(here):
    (here / "d.jsonl").write_text(QUESTIONS)
    (here / "r.py").write_text(REWARD)
    _, recipe = read(["grpo", "--model", "M", "--data", "d.jsonl"])
    assert recipe.task == TaskSpec(name="maths", options={"data": "d.jsonl"})
    assert (recipe.model, recipe.method) == ("M", METHODS["grpo"])
    words = "grpo --data d.jsonl --reward r.py:f --reward=r.py:g=0.5 --task.options.system S."
    asked, recipe = read(words.split())
    assert asked.reward == ("r.py:f", "r.py:g=0.5")
    assert recipe.task.name == "rewards"
    assert recipe.task.options == {"data": "d.jsonl", "rewards": "r.py:f, r.py:g=0.5", "system": "S."}
    _, recipe = read(["gpu_jsonl", "--data", "d.jsonl"])
    assert recipe.task.options["suffix"].startswith("Work it out")  # the same task, so that its options stay


def test_a_reward_without_data_and_data_beside_another_task_are_refused(here):
    assert "give it with --data FILE.jsonl" in refused("grpo --reward r.py:f")
    assert "give it or --task.name, not both" in refused("grpo --data d.jsonl --task.name arithmetic")
    assert "--reward needs a text after it" in refused("grpo --data d.jsonl --reward --seed 3")


@pytest.mark.parametrize(
    "words",
    ["chain_sum", "working", "grpo --data d.jsonl", "gpu_jsonl --model smollm2-135m --data d.jsonl --device cpu"],
)
def test_every_recipe_says_what_it_will_cost(words, here, capsys):
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("math_verify")
    (here / "d.jsonl").write_text(QUESTIONS)
    assert cli.main(["train", *words.split(), "--dry-run"]) in (0, None)
    assert "steps, if every sample is as long as may be" in capsys.readouterr().out


def test_other_questions_are_not_answered_with_the_result_of_a_finished_run(here, monkeypatch):
    for name in ("d.jsonl", "other.jsonl"):
        (here / name).write_text(QUESTIONS)
    (here / "r.py").write_text(REWARD)
    recipe = read(["grpo", "--data", "d.jsonl"])[1]
    task = replace(recipe.task, options={"data": str(here / "d.jsonl")})
    finished_run(here / "runs" / "grpo", recipe.num_steps, replace(recipe, task=task))
    calls = []
    monkeypatch.setattr(rung, "train", lambda recipe, **options: calls.append(recipe.task), raising=False)
    cli.main(["train", "grpo", "--data", "other.jsonl", "--or-resume"])
    cli.main(["train", "grpo", "--data", "d.jsonl", "--reward", "r.py:g", "--or-resume"])
    assert [task.options["data"] for task in calls] == ["other.jsonl", "d.jsonl"]
