"""What a GPU will do, on a simulated second device: nothing of host and device mixes, and every bit is the CPU's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from elsewhere import DEVICE, elsewhere
from train.tiny import made_samples, stop_after, tiny_decoder, tiny_recipe, weights_of

import rung
from rung.core import device as devices
from rung.core.checkpoint import load_newest, save
from rung.core.errors import ConfigError
from rung.engine.types import WeightsRef
from rung.lm.adapters.lora import Adapter, BaseDecoder, native_sites
from rung.lm.adapters.spec import LoRA
from rung.lm.state import KVState
from rung.tasks.sandbox import UnknownWatch
from rung.train import estimate as estimates
from rung.train.config import GroupRL, Method, Optim, TaskSpec
from rung.train.data import count, pack_one
from rung.train.grpo import Trainer, learn
from rung.train.policy import LanguagePolicy, frozen_copy
from rung.train.session import fingerprint, row_sums
from rung.train.step import Learner

KL = Method(advantage="mean", kl="k3_loss", kl_coef=0.5, entropy_coef=0.01)
RECIPE = GroupRL(
    name="a", task=TaskSpec(name="arithmetic"), method=KL, updates_per_rollout=2, tokens_per_micro_batch=20
)


class NoSource:
    """These samples are made, not drawn."""

    def submit(self, asks, weights): ...

    def poll(self): ...


def made(device: torch.device, *, dtype: torch.dtype, lora: bool, again: bool) -> Trainer:
    """A learner of the tiny model, or of an adapter on it, with a reference, and no source of samples."""
    decoder = tiny_decoder(dtype=dtype if lora else torch.float32).to(device)  # masters are fp32; a base rests
    decoder.activation_checkpointing = again
    parameters, reference = dict(decoder.named_parameters()), frozen_copy(decoder)
    if lora:
        adapter = Adapter(decoder, native_sites(decoder), LoRA(rank=3), seed=0)
        parameters, reference = adapter.parameters, BaseDecoder(decoder, adapter)
    return Trainer(
        recipe=RECIPE,
        decoder=decoder,
        reference=reference,
        learner=Learner(parameters, Optim(lr=1e-2, grad_clip=0.005), num_steps=9, dtype=dtype),
        source=NoSource(),
        problems=lambda step, refill, count: [],
        weights=WeightsRef,
        phase=lambda name: None,
        watch=UnknownWatch(),
    )


def learnt(device: torch.device, folder: Path, **kind):
    """Masters, metrics and fingerprint after two steps of two updates each, a checkpoint, and one more step of a
    learner that was restored from it."""
    samples = made_samples(dtype=torch.float32)
    groups = [[sample for sample in samples if sample.group_id == group] for group in range(3)]
    first, second = made(device, **kind), made(device, **kind)
    metrics = [learn(first, groups), learn(first, groups)]
    save(folder, 1, first.learner.state(), {})
    kept = load_newest(folder)
    second.learner.restore({name: kept.tensors(name) for name in ("masters", "adam_m", "adam_v")}, num_updates=4)
    moments = [tensor for state in second.learner.adamw.state.values() for tensor in state.values()]
    assert {tensor.device for tensor in (*moments, *second.learner.masters.values())} == {device}
    metrics.append(learn(second, groups))
    masters = {name: master.cpu() for name, master in second.learner.masters.items()}
    return masters, metrics, fingerprint(second.learner.compute)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_with_a_reference_checkpoints_and_a_restored_learner_have_the_cpus_bits(tmp_path, dtype, lora, again):
    kind = {"dtype": dtype, "lora": lora, "again": again}
    masters, metrics, name_of_all = learnt(torch.device("cpu"), tmp_path / "here", **kind)
    with elsewhere():
        masters_there, metrics_there, name_of_all_there = learnt(DEVICE, tmp_path / "there", **kind)
    assert metrics == metrics_there
    assert metrics[0]["loss"] != metrics[1]["loss"]
    for name, master in masters.items():
        assert torch.equal(master, masters_there[name]), name
    assert name_of_all == name_of_all_there


def test_a_micro_batch_makes_the_host_wait_for_its_scores_and_for_nothing_else():
    """Two tensors come down, log-probabilities and entropies; nothing is read to decide anything.  Backwards, one
    gradient goes up for each of them that has one, and nothing comes down."""
    samples = made_samples(dtype=torch.float32)
    batch = pack_one(samples, counts=count(samples))
    with elsewhere() as traffic:
        decoder = tiny_decoder().to(DEVICE)
        down, policy = traffic.down, LanguagePolicy(decoder)
        scores = policy.scores(batch)
        assert traffic.down - down == 2
        assert scores.logp_T.device == scores.entropy_T.device == torch.device("cpu")
        up = traffic.up
        (scores.logp_T.sum() + scores.entropy_T.sum()).backward()
        assert (traffic.up - up, traffic.down - down) == (2, 2)
        assert traffic.host_indices == 0, "an index of the host would be moved anew for every use"


@pytest.mark.parametrize("shape", [(0, 256), (1, 256), (37, 256)])
def test_row_sums_are_the_same_modulo_2_to_the_64_with_and_without_a_matrix_product(shape):
    draw = torch.Generator().manual_seed(0)
    words_RC = torch.randint(-(2**63), 2**63 - 1, shape, generator=draw)
    factor_C = torch.randint(-(2**63), 2**63 - 1, shape[1:], generator=draw) | 1
    exact = [sum(a * b for a, b in zip(row, factor_C.tolist(), strict=True)) for row in words_RC.tolist()]
    assert [value % 2**64 for value in row_sums(words_RC, factor_C).tolist()] == [value % 2**64 for value in exact]
    with elsewhere():
        there = row_sums(words_RC.to(DEVICE), factor_C.to(DEVICE))
        assert there.device == DEVICE
        assert torch.equal(there.cpu(), row_sums(words_RC, factor_C))


@pytest.fixture
def reachable(monkeypatch):
    """The simulated device has a name, and room.  Beyond the simulation are a cache that grows in place, and inference
    mode, in which PyTorch shows other operations to it: there it is without gradients."""
    monkeypatch.setitem(devices.LACKS, DEVICE.type, lambda device: "")
    monkeypatch.setattr(estimates, "free_memory", lambda device: 1e12)
    monkeypatch.setattr(KVState, "_resize", fresh_rows)
    entered: list[bool] = []
    without = {
        "__enter__": lambda self: (entered.append(torch.is_grad_enabled()), torch.set_grad_enabled(False)),
        "__exit__": lambda self, *_: torch.set_grad_enabled(entered.pop()),
    }
    for name, function in without.items():
        monkeypatch.setattr(torch.inference_mode, name, function)


def fresh_rows(state: KVState, wanted: int) -> None:
    if state.rows[0].shape[3] < wanted:
        state.rows = [rows.new_zeros(*rows.shape[:3], state.capacity, rows.shape[4]) for rows in state.rows]
        state.clean_S.fill_(state.capacity)


KINDS = {
    "fp32": {},
    "bf16, a reference, checkpointed": {"dtype": "bf16", "activation_checkpointing": True, "method": KL},
    "LoRA": {"lora": LoRA(rank=4, alpha=8.0), "optim": Optim(lr=3e-2)},
    "LoRA, its base in fewer bits than its file": {"lora": LoRA(rank=4, alpha=8.0), "dtype": "bf16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run_stopped_and_resumed_ends_with_the_same_bits(folder, tmp_path, reachable, kind):
    """Loading, self-test, sampling, learning, checkpoints, evaluations and the folder that is written.  In fp32 the
    bits are the CPU's too; in bf16 the CPU has kernels of its own for a step of one row."""
    here = tiny_recipe(folder, **{"num_steps": 3, "eval_every": 0, "checkpoint_every": 1} | KINDS[kind])
    there, places = replace(here, device=str(DEVICE)), [tmp_path / "whole", tmp_path / "stopped"]
    with elsewhere() as traffic:
        rung.train(there, folder=places[0])
        with pytest.raises(KeyboardInterrupt):
            rung.train(there, folder=places[1], listener=stop_after(2))
        rung.resume(places[1])
    assert traffic.down > 0
    if here.dtype == "fp32":
        places.append(tmp_path / "here")
        rung.train(here, folder=places[2])
    assert len({weights_of(place) for place in places}) == 1
    for name in ("samples.jsonl", "evals.jsonl"):
        assert len({(place / name).read_bytes() for place in places}) == 1, name


def test_a_run_is_not_begun_or_resumed_where_its_device_is_not(folder, tmp_path, monkeypatch, reachable):
    recipe = tiny_recipe(folder, device=str(DEVICE), num_steps=2, eval_every=0)
    with elsewhere(), pytest.raises(KeyboardInterrupt):
        rung.train(recipe, folder=tmp_path / "run", listener=stop_after(1))
    monkeypatch.setitem(devices.LACKS, DEVICE.type, lambda device: "it is gone: fetch it.")
    with pytest.raises(ConfigError, match="it is gone: fetch it"):
        rung.resume(tmp_path / "run")
    with pytest.raises(ConfigError, match="it is gone: fetch it"):
        rung.train(recipe, folder=tmp_path / "other")
    assert not (tmp_path / "other").exists()
