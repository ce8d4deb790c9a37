"""What a run will need, counted before it starts, and again before it goes on."""

import math
from dataclasses import replace

import pytest
from train.tiny import tiny_recipe

import rung
from rung.core.errors import ConfigError
from rung.core.rundir import create, open_run
from rung.tasks.load import load_task
from rung.train import estimate as estimates
from rung.train.config import Method, TaskSpec


def test_a_run_that_no_longer_fits_is_not_resumed(whole, folder, tmp_path, monkeypatch):
    run = create(tmp_path / "run", tiny_recipe(folder), open_run(whole.folder).environment())
    monkeypatch.setattr(estimates, "available_memory", lambda: 1e6)
    with pytest.raises(ConfigError, match=r"needs about .* GB, and 0\.0 GB are free"):
        rung.resume(run.folder)


def test_long_prompts_need_a_longer_cache_and_more_time(folder, tmp_path):
    (tmp_path / "long.py").write_text(
        (folder.parent / "letters.py").read_text().replace("say a", "say a " * 9 + "say a")
    )
    short = tiny_recipe(folder)
    long = replace(short, task=TaskSpec(name=f"{tmp_path / 'long.py'}:reward"))
    model = rung.load(folder)
    tasks = [load_task(recipe.task.name, {}) for recipe in (short, long)]
    lengths = [max(estimates.prompt_lengths(model, [t.problem(i) for i in range(40)])) for t in tasks]
    assert lengths[1] == lengths[0] + 9 * len("say a ")
    caches = [estimates.memory(short, model.decoder.config, n)["key-value cache"] for n in lengths]
    assert caches[1] / caches[0] == (lengths[1] + 5) / (lengths[0] + 5)
    assert math.isclose(
        sum(estimates.memory(long, model.decoder.config, lengths[1]).values()), rung.estimate(long).bytes
    )


def test_an_estimate_grows_with_what_is_asked(folder):
    small, large = rung.estimate(tiny_recipe(folder)), rung.estimate(tiny_recipe(folder, tokens_per_micro_batch=8192))
    assert large.bytes > small.bytes
    assert math.isfinite(small.seconds)
    assert any("free" in line for line in small.lines)
    with_reference = rung.estimate(tiny_recipe(folder, method=Method(kl="k3_loss", kl_coef=0.1)))
    assert with_reference.bytes > small.bytes
