"""A run of a model of the Hub means one commit of it, from its first step to its last resume."""

from pathlib import Path

import pytest
from lm.hub_server import Hub, serving
from train.tiny import tiny_folder, tiny_recipe

import rung
from rung.core.rundir import open_run
from rung.train.run import resume

constants = pytest.importorskip("huggingface_hub.constants")
REPO = "org/tiny"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after_two(news) -> None:
    if news.stage == "train" and news.done == 2:
        raise KeyboardInterrupt


def test_a_run_goes_on_with_the_commit_it_began_with_though_the_branch_has_moved(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RUNG_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    small = {"num_steps": 3, "eval_every": 0, "checkpoint_every": 2}
    local = rung.train(tiny_recipe(folder, **small), folder=tmp_path / "local")
    with serving(Hub()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        commit = hub.put(REPO, contents(folder))
        recipe = tiny_recipe(folder, **small, model=REPO)
        with pytest.raises(KeyboardInterrupt):
            rung.train(recipe, folder=tmp_path / "run", listener=stop_after_two)
        assert open_run(tmp_path / "run").config(type(recipe)).model == f"{REPO}@{commit}"
        hub.put(REPO, contents(tiny_folder(tmp_path / "other" / "model", seed=1)))
        hub.asked.clear()
        finished = resume(tmp_path / "run")
        assert hub.asked == []
    for name in ("model.safetensors", "tokenizer.json"):
        assert (finished.folder / "model" / name).read_bytes() == (local.folder / "model" / name).read_bytes()
