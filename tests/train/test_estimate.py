"""What a run will need, counted before it starts, and again before it goes on."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from elsewhere import DEVICE, elsewhere
from train.tiny import tiny_decoder, tiny_recipe

import rung
from rung.core import device as devices
from rung.core.errors import ConfigError
from rung.core.records import GroupRequest, Layout, Sampling
from rung.core.rundir import create, open_run
from rung.engine.engine import Engine
from rung.lm.adapters.spec import LoRA
from rung.lm.decoder import Decoder
from rung.objectives.logprobs import CHUNK_ROWS
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
    caches = [estimates.memory(short, model, n)["key-value cache"] for n in lengths]
    assert caches[1] / caches[0] == (lengths[1] + 5) / (lengths[0] + 5)
    assert math.isclose(sum(estimates.memory(long, model, lengths[1]).values()), rung.estimate(long).bytes)


BASE = tiny_decoder().config
MIXER = BASE.blocks[0].mixer
BLOCKS = {
    "Llama": BASE.blocks[0],
    "heads normed": replace(BASE.blocks[0], mixer=replace(MIXER, qk_norm="head", window=3)),
    "width normed, norms behind": replace(BASE.blocks[0], norms="after", mixer=replace(MIXER, qk_norm="width")),
    "norms before and behind": replace(BASE.blocks[0], norms="both", mixer=replace(MIXER, softcap=2.0)),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_activations_are_what_autograd_keeps(block):
    """All tensors kept for the backward pass that grow with the tokens, byte for byte; what is not in a block is the
    last norm's input and the token's id."""
    config = replace(BASE, blocks=(BLOCKS[block],) * 3)
    decoder = Decoder(config)
    weights = {parameter.data_ptr() for parameter in decoder.parameters()}

    def kept(tokens: int) -> int:
        sizes = {}

        def pack(tensor):
            if tensor.data_ptr() not in weights:
                sizes[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept_alive = decoder(torch.zeros(tokens).long(), Layout.chain(tokens))
        assert len(kept_alive) == tokens
        return sum(size for size, _ in sizes.values())

    a_token = (kept(80) - kept(40)) / 40
    assert a_token == 4 * decoder.footprint().activations + 4 * config.width + 8


def test_with_activation_checkpointing_the_count_is_every_input_and_one_block_of_the_rest(folder):
    """The tiny model has two blocks of width 24; of what a token leaves behind, each holds half."""
    model, plain = rung.load(folder), tiny_recipe(folder)
    again = replace(plain, activation_checkpointing=True)
    assert estimates.activations(again, model) == 2 * 24 + model.decoder.footprint().activations / 2
    lora = LoRA(rank=3)
    more = estimates.activations(replace(plain, lora=lora), model) - estimates.activations(plain, model)
    less = estimates.activations(replace(again, lora=lora), model) - estimates.activations(again, model)
    assert more == 2 * less > 0
    fixed = [estimates.duration(recipe, model, 1.0, 10.0) for recipe in (plain, again)]
    packed = plain.num_steps * (4 * 10 + 16 * 5)  # the forward pass of all tokens that are learnt from, once more
    weights = model.decoder.footprint().parameters
    assert math.isclose((fixed[1] - fixed[0]) * estimates.EFFICIENCY, 2 * weights * packed)


def test_a_gpu_has_its_own_free_memory_rate_libraries_and_copies_of_the_logits(folder, monkeypatch):
    """What torch says of a GPU is replaced; the products are computed here."""
    monkeypatch.setitem(devices.LACKS, "cuda", lambda device: "")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3e9, 8e9))
    monkeypatch.setattr(estimates, "multiply_rate", lambda dtype, device: {"cuda": 1e12, "cpu": 1e11}[device.type])
    here, there = (tiny_recipe(folder, device=device, dtype="bf16") for device in ("cpu", "cuda"))
    found = {recipe.device: rung.estimate(recipe) for recipe in (here, there)}
    assert found["cpu"].seconds == pytest.approx(10 * found["cuda"].seconds)
    assert "3.0 GB free" in found["cuda"].lines[-2]
    copies = 2 * 4 * 258 * CHUNK_ROWS  # of a chunk of logits, both in fp32
    libraries = estimates.GPU_LIBRARY - estimates.LIBRARY
    assert found["cuda"].bytes - found["cpu"].bytes == pytest.approx(copies + libraries)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1e6, 8e9))
    with pytest.raises(ConfigError, match=r"0\.0 GB are free"):
        rung.train(there, folder=folder.parent / "never")


def test_the_rate_of_a_device_is_that_of_the_products_it_has_finished(monkeypatch):
    monkeypatch.setattr(estimates, "GPU_RATE_SIZE", (8, 8, 8))
    with elsewhere() as traffic:
        assert 0 < estimates.multiply_rate(torch.float32, DEVICE) < math.inf
        assert traffic.down == 2, "before the clock starts, and before it is read"


def test_a_device_that_is_not_here_makes_time_unknown_and_memory_counted(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = rung.estimate(tiny_recipe(folder, device="cuda:1"))
    assert math.isnan(found.seconds)
    assert found.bytes > 0
    assert "device cuda:1 needs CUDA" in found.lines[-1]


def test_an_estimate_grows_with_what_is_asked(folder):
    small, large = rung.estimate(tiny_recipe(folder)), rung.estimate(tiny_recipe(folder, tokens_per_micro_batch=8192))
    assert large.bytes > small.bytes
    assert math.isfinite(small.seconds)
    assert any("free" in line for line in small.lines)
    with_reference = rung.estimate(tiny_recipe(folder, method=Method(kl="k3_loss", kl_coef=0.1)))
    assert with_reference.bytes > small.bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_problems": 40, "prompts_per_step": 1},  # an evaluation asks more than a step
        {"prompts_per_step": 2, "samples_per_prompt": 20},
        {"prompts_per_step": 2, "samples_per_prompt": 20, "max_turns": 2},  # then every sample is a request
        {"eval_problems": 40, "slots": 6},
    ],
)
def test_the_slots_that_are_counted_are_those_of_the_largest_call(changes):
    recipe = tiny_recipe(Path("unused"), **changes)
    engine, sampling = Engine(tiny_decoder(), slots=recipe.slots), Sampling(max_tokens=1)

    def run(prompts: int, samples: int) -> None:
        request = GroupRequest(prompt_ids=(1, 2), keys=tuple(range(samples)), sampling=sampling)
        engine.run([request] * prompts)

    run(recipe.eval_problems, 1)
    run(recipe.prompts_per_step, recipe.samples_per_prompt)
    if recipe.max_turns > 1:
        run(recipe.prompts_per_step * recipe.samples_per_prompt, 1)
    assert engine.runner.state.slots == estimates._slots(recipe)


def test_later_turns_read_the_episode_again_and_an_evaluation_has_them_too(folder):
    """Sums of tokens by hand: a prompt of 10, answers of 5, 10 tokens said before the second and the third."""
    recipe = tiny_recipe(folder, max_turns=3, num_steps=1, prompts_per_step=1, samples_per_prompt=4, eval_problems=7)
    model = rung.load(folder)
    weights = model.decoder.footprint().parameters
    read = (10 + 5 + 10) + (10 + 5 + 10 + 5 + 10)  # by the second turn and the third
    rolled = 2 * (10 + 4 * (15 + read))
    learned = 6 * (10 + 4 * (15 + 20))
    evaluated = 2 * 2 * 7 * (10 + 15 + read)
    found = estimates.duration(recipe, model, 1.0, 10.0) * estimates.EFFICIENCY
    assert math.isclose(found, weights * (rolled + learned + evaluated))
    alone = estimates.duration(replace(recipe, share_prompts=False), model, 1.0, 10.0) * estimates.EFFICIENCY
    assert math.isclose(alone - found, weights * 6 * 3 * 10)


def test_an_episode_longer_than_a_micro_batch_is_counted_whole(folder):
    model = rung.load(folder)
    recipe = tiny_recipe(folder, max_turns=3, tokens_per_micro_batch=20)
    long = estimates.memory(recipe, model, 30)["activations"]
    assert long == estimates.memory(replace(recipe, tokens_per_micro_batch=105), model, 30)["activations"]
