"""Our sides: the engine, the learner and the whole step exactly as a run uses them."""

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import workload
from rung.core.environment import environment
from rung.core.keys import derive_key
from rung.core.progress import silent
from rung.core.records import Completion, GroupRequest, Sampling
from rung.core.rundir import create
from rung.engine.engine import Engine
from rung.engine.sampling import Laws, draw
from rung.lm.adapters.spec import LoRA
from rung.model.model import compute_dtype, load
from rung.train.config import METHODS, GroupRL, Optim, TaskSpec
from rung.train.data import count, pack, sample_of
from rung.train.grpo import train_step
from rung.train.methods import build_objective, group_streams
from rung.train.policy import LanguagePolicy
from rung.train.session import PhaseLog, open_session
from rung.train.step import Learner

Turn = Callable[[int], Mapping[str, float]]
GRPO = replace(METHODS["grpo"], kl="none", kl_coef=0.0)  # trl's beta = 0: no reference model on either side


def rollout(spec: Mapping[str, Any]) -> Turn:
    """The engine on the same prompts, with the same lengths forced by each sample's own limit."""
    model = load(spec["model"], dtype=spec["dtype"])
    engine = Engine(model.decoder, slots=spec["slots"])
    limits = iter(spec["lengths"])
    groups = [(tuple(prompt), [next(limits) for _ in range(spec["samples"])]) for prompt in spec["prompts"]]

    def turn(number: int) -> Mapping[str, float]:
        requests = [
            GroupRequest(
                prompt_ids=prompt,
                keys=tuple(derive_key(number, group, draw) for draw in range(len(same))),
                sampling=Sampling(max_tokens=limit),
            )
            for group, (prompt, wanted) in enumerate(groups)
            for limit in sorted(set(wanted))
            if (same := [length for length in wanted if length == limit])
        ]
        start = time.perf_counter()
        drawn, stats = engine.run(requests)
        taken = time.perf_counter() - start
        tokens = sum(len(c.token_ids) for completions in drawn for c in completions)
        assert tokens == sum(spec["lengths"])
        parts = {"prefill": stats.seconds_prefill, "decode": stats.seconds_decode, "steps": stats.steps}
        return {"seconds": taken, "tokens": tokens, **parts}

    return turn


def floor(spec: Mapping[str, Any]) -> Turn:
    """Seconds to stream the weights once from memory, by the fastest of three ways to read a tensor."""
    decoder = load(spec["model"], dtype=spec["dtype"]).decoder
    words = [p.detach().reshape(-1).view(torch.int64) for p in decoder.parameters() if p.numel() % 4 == 0]
    read = sum(w.numel() * 8 for w in words)
    ways: list[Callable[[torch.Tensor], object]] = [
        torch.sum,
        torch.max,
        lambda w: torch.bitwise_and(w[: len(w) // 2], w[len(w) // 2 : len(w) // 2 * 2]),
    ]

    def turn(number: int) -> Mapping[str, float]:
        best = min(_timed(lambda way=way: [way(w) for w in words]) for way in ways for _ in range(3))
        return {"seconds": best, "bytes": read, "tokens": 1}

    return turn


def learner(spec: Mapping[str, Any]) -> Turn:
    """Forward and backward of a step, gradients clipped but no update, timed by the learner's own phases."""
    model = load(spec["model"], dtype="fp32")
    optimiser = Learner(
        dict(model.decoder.named_parameters()), Optim(lr=0.0), num_steps=1, dtype=compute_dtype(spec["dtype"])
    )
    groups = workload.batch(spec["batch"], model.decoder.config.vocab_size)
    limit = spec["batch"]["completion"][1]
    samples = []
    for number, (prompt, completions, rewards) in enumerate(groups):
        group = [
            sample_of(prompt, completion_of(ids), problem_id=str(number), group_id=number, reward=reward)
            for ids, reward in zip(completions, rewards, strict=True)
        ]
        samples += group_streams(GRPO, group, max_tokens=limit)
    objective, policy = build_objective(GRPO), LanguagePolicy(model.decoder)
    tokens = sum(len(ids) for _, completions, _ in groups for ids in completions)

    def turn(number: int) -> Mapping[str, float]:
        clock = {"start": time.perf_counter()}
        batches = pack(samples, counts=count(samples), tokens_per_batch=GroupRL.tokens_per_micro_batch)
        result = optimiser.step(
            batches, policy, objective, phase=lambda name: clock.update({name: time.perf_counter()})
        )
        return {"seconds": clock["update"] - clock["start"], "tokens": tokens, "grad_norm": result.grad_norm}

    return turn


def step(spec: Mapping[str, Any]) -> Turn:
    """`train_step` of a real run: prompts rendered, sampled, graded by the grading child, learnt; only evaluation,
    checkpoints and the record are left out."""
    recipe = GroupRL(
        name="bench",
        model=spec["model"],
        task=TaskSpec(name=str(Path(workload.__file__)) + ":reward"),
        prompts_per_step=spec["num_prompts"],
        samples_per_prompt=spec["samples"],
        max_tokens=spec["max_tokens"],
        num_steps=1000,
        method=GRPO,
        optim=Optim(lr=1e-6),
        lora=LoRA(**(spec.get("lora") or {})),
        dtype=spec["dtype"],
    )
    stack = ExitStack()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rung-bench-"))) / "run"
    run = create(folder, recipe, environment())
    session = stack.enter_context(open_session(recipe, run, 1, PhaseLog(run), silent))
    prompt = len(session.model.prompt_ids(session.task.problem(0).messages))
    per_group = prompt + spec["samples"] * spec["max_tokens"]
    equal = replace(recipe, tokens_per_micro_batch=spec["micro_batch"] // spec["samples"] * per_group)
    trainer = replace(session.trainer, recipe=equal)
    session.rollouts.sampling = replace(session.sampling, stop_ids=())  # lengths are forced on both sides

    def turn(number: int, stack: ExitStack = stack) -> Mapping[str, float]:
        start = time.perf_counter()
        record = train_step(trainer, number + 1)
        taken = time.perf_counter() - start
        stats = session.rollouts.stats
        assert record.metrics["tokens"] == spec["num_prompts"] * spec["samples"] * spec["max_tokens"]
        parts = {"prefill": stats.seconds_prefill, "decode": stats.seconds_decode}
        return {"seconds": taken, "tokens": record.metrics["tokens"], **parts, "learn": record.metrics["seconds_learn"]}

    return turn


def sampling(spec: Mapping[str, Any]) -> Turn:
    """Drawing one token for each of `rows` rows of bf16 logits."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = (4 * torch.randn(spec["rows"], spec["vocabulary"], generator=generator)).to(torch.bfloat16)
    law = Sampling(max_tokens=1, temperature=spec["temperature"])
    laws = Laws.of([law] * spec["rows"], list(range(spec["rows"])))
    position_N = torch.arange(spec["rows"])

    def turn(number: int) -> Mapping[str, float]:
        with torch.inference_mode():
            times = [_timed(lambda: draw(logits_NV, position_N, laws)) for _ in range(20)]
        return {"seconds": sorted(times)[len(times) // 2], "tokens": spec["rows"]}

    return turn


def completion_of(ids: list[int]) -> Completion:
    """These tokens as if they had been sampled."""
    zeros = (0.0,) * len(ids)
    law = Sampling(max_tokens=len(ids))
    return Completion(
        token_ids=tuple(ids),
        logp_sampled=zeros,
        logp_raw=zeros,
        stop="eos",
        policy_version=0,
        weights_hash="",
        sampling=law,
        key=0,
    )


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
