"""kill -9 at any moment: a real `rung train` is killed in each of its phases, and its continuation changes nothing."""

import subprocess
from pathlib import Path

import pytest
from train.games import game_recipe
from train.kills import PHASES, check_continuation, command, environment, kill_in
from train.tiny import tiny_folder, tiny_recipe

from rung.core.config import dumps_json


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    """Big enough that every phase lasts: a step of about a tenth of a second, most of it in sampling."""
    folder = tmp_path_factory.mktemp("kill")
    recipe = tiny_recipe(tiny_folder(folder / "model"), num_steps=8, max_tokens=24, dtype="fp32")
    (folder / "recipe.json").write_text(dumps_json(recipe))
    return folder / "recipe.json"


@pytest.fixture(scope="module")
def game_file(tmp_path_factory) -> Path:
    """The same with three turns an episode: every step grades three times, and samples between."""
    folder = tmp_path_factory.mktemp("kill_game")
    changes = {"num_steps": 8, "eval_every": 3, "options": {"letters": "abc"}, "max_tokens": 8}
    (folder / "recipe.json").write_text(dumps_json(game_recipe(tiny_folder(folder / "model"), **changes)))
    return folder / "recipe.json"


@pytest.fixture(scope="module")
def whole(recipe_file) -> Path:
    return uninterrupted(recipe_file)


@pytest.fixture(scope="module")
def whole_game(game_file) -> Path:
    return uninterrupted(game_file)


def uninterrupted(recipe_file: Path) -> Path:
    folder = recipe_file.parent / "whole"
    subprocess.run(
        command("train", recipe_file, "--folder", folder), check=True, capture_output=True, env=environment()
    )
    return folder


def test_a_run_killed_while_it_learns_goes_on_bit_for_bit(recipe_file, whole, tmp_path):
    kill_in("backward", 0.0, recipe_file, tmp_path / "run")
    check_continuation(tmp_path / "run", whole)


def test_a_run_killed_between_the_turns_of_its_episodes_goes_on_bit_for_bit(game_file, whole_game, tmp_path):
    kill_in("grade", 0.01, game_file, tmp_path / "run")
    check_continuation(tmp_path / "run", whole_game)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.005, 0.02, 0.04, 0.08])
def test_a_run_killed_at_any_moment_of_its_episodes_goes_on_bit_for_bit(delay, game_file, whole_game, tmp_path):
    kill_in("grade", delay, game_file, tmp_path / "run")
    check_continuation(tmp_path / "run", whole_game)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_in_any_phase_goes_on_bit_for_bit(phase, recipe_file, whole, tmp_path):
    """The phase in which the kill fell is read from the log; tried again until it fell inside the phase wanted.

    Every other try kills at once, since a phase may last a millisecond; the delays between them grow."""
    for attempt in range(20):
        folder = tmp_path / f"run{attempt}"
        if kill_in(phase, 0.001 * (attempt // 2) * (attempt % 2), recipe_file, folder) == phase:
            check_continuation(folder, whole)
            return
    raise AssertionError(f"twenty kills, and none fell inside {phase}")


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_named_and_nothing_is_lost(recipe_file, whole, tmp_path):
    """A limit on the size of files, below that of a checkpoint's tensors and above that of all logs so far."""
    largest = max(p.stat().st_size for p in (whole / "checkpoints").rglob("*.safetensors"))
    limit = largest // 1024 - 4
    limited = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-", *command("train", recipe_file)]
    folder = tmp_path / "run"
    failed = subprocess.run([*limited, "--folder", str(folder)], capture_output=True, text=True, env=environment())
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "the checkpoint of step 2 needs" in failed.stderr
    assert not list((folder / "checkpoints").iterdir()), "half a checkpoint was left"
    check_continuation(folder, whole)
