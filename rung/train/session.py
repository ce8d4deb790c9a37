"""A recipe made into the objects that run it: checked, loaded, tried, and ready for `grpo.train_step`."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch

from rung.core.device import device_named
from rung.core.errors import ConfigError, RungError
from rung.core.journal import GradeJournal
from rung.core.keys import derive_key, signed, splitmix64
from rung.core.progress import Listener, Progress
from rung.core.records import GroupRequest, Sampling
from rung.core.rundir import RunDir
from rung.core.shapes import Int, Tensor
from rung.engine.engine import Engine
from rung.engine.types import WeightsRef
from rung.lm.adapters.lora import Adapter, BaseDecoder
from rung.lm.adapters.peft import save_adapter
from rung.lm.adapters.spec import LoRA
from rung.lm.decoder import Decoder as OwnDecoder
from rung.lm.linear import PACK_AFTER
from rung.lm.protocols import Decoder
from rung.model.model import Model, compute_dtype, load
from rung.tasks.base import Task, draw
from rung.tasks.load import load_task
from rung.tasks.sandbox import Grader, UnknownWatch
from rung.train.config import GroupRL
from rung.train.grpo import Trainer
from rung.train.methods import check_method, needs_reference
from rung.train.policy import frozen_copy
from rung.train.rewards import JournalledGrades
from rung.train.rollouts import LocalRollouts, bounds_of
from rung.train.step import Learner

NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
SELF_TEST_TOKENS = 8
SELF_TEST_CHANGE = 0.05  # of a weight, or of what an adapter adds to a layer's output per unit of its A x
FINGERPRINT_WORDS = 256  # summed at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """Everything a run holds in memory.  adapter: what learns in place of the model's own weights, if anything."""

    recipe: GroupRL
    model: Model
    adapter: Adapter | None
    task: Task
    engine: Engine
    grader: Grader
    learner: Learner
    rollouts: LocalRollouts
    trainer: Trainer
    sampling: Sampling
    journal: GradeJournal


def check_recipe(recipe: GroupRL) -> None:
    """Refuse a recipe that cannot be meant.  Raises ConfigError."""
    for name, neutral in NEUTRAL.items():
        if getattr(recipe, name) != neutral:
            raise ConfigError(
                f"{name} = {getattr(recipe, name)} is refused in RL: the learner scores the whole softmax, and samples "
                f"filtered by {name} would be off-policy in silence. Leave it at {neutral}; temperature is allowed."
            )
    counts = ("num_steps", "prompts_per_step", "samples_per_prompt", "max_tokens", "max_turns", "updates_per_rollout")
    sizes = ("slots", "tokens_per_micro_batch", "checkpoint_every", "eval_problems", "validation_problems")
    for name in (*counts, *sizes):
        if getattr(recipe, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(recipe, name)}.")
    if not recipe.temperature > 0:
        raise ConfigError(
            f"temperature must be positive in RL, not {recipe.temperature}: greedy samples teach nothing."
        )
    if recipe.updates_per_rollout > recipe.prompts_per_step:
        raise ConfigError(
            f"updates_per_rollout slices the groups of a step: it is {recipe.updates_per_rollout}, and cannot be more "
            f"than prompts_per_step, {recipe.prompts_per_step}."
        )
    if not recipe.lora.on and recipe.lora != LoRA():
        raise ConfigError("lora has settings and lora.rank is 0, which is no adapter: set lora.rank (16, say).")
    if recipe.max_length < 0:
        raise ConfigError(f"max_length must be 0 (all of the model's positions) or more, not {recipe.max_length}.")
    device_named(recipe.device)
    if recipe.optim.lr < 0 or recipe.optim.grad_clip <= 0:
        raise ConfigError("optim.lr cannot be negative, and optim.grad_clip must be positive.")
    check_method(
        recipe.method,
        samples_per_prompt=recipe.samples_per_prompt,
        updates_per_rollout=recipe.updates_per_rollout,
        max_tokens=recipe.max_tokens * recipe.max_turns,
    )


def use_threads(number: int) -> None:
    """Fix what a bit-for-bit repetition needs: the number of threads (0: all cores), and deterministic kernels."""
    torch.set_num_threads(number or len(os.sched_getaffinity(0)))
    torch.use_deterministic_algorithms(True)


@contextmanager
def open_session(recipe: GroupRL, run: RunDir, since: int, phase: "PhaseLog", listener: Listener) -> Iterator[Session]:
    """Load the model, make masters and reference, start the grading child; all are released at the end.

    With an adapter the weights are there once, in the compute dtype, and rest; the reference is the adapter off.

    since: the step that will be repeated first (its journalled grades are replayed)
    """
    with ExitStack() as stack:
        task = load_task(recipe.task.name, recipe.task.options)
        grader = stack.enter_context(Grader(recipe.task.name, recipe.task.options, recipe.grading))
        start = recipe.dtype if recipe.lora.on else "fp32"
        model = load(recipe.model, dtype=start, device=recipe.device, foreign=recipe.foreign, listener=listener)
        if isinstance(model.decoder, OwnDecoder):  # with another one `weightless` has refused it
            model.decoder.activation_checkpointing = recipe.activation_checkpointing
        adapter = adapter_of(model, recipe) if recipe.lora.on else None
        sampling = Sampling(
            max_tokens=recipe.max_tokens, temperature=recipe.temperature, stop_ids=model.tokenizer.eos_ids
        )
        parameters = dict(model.decoder.named_parameters()) if adapter is None else adapter.parameters
        updates = recipe.num_steps * recipe.updates_per_rollout
        dtype = compute_dtype(recipe.dtype, recipe.device)
        learner = Learner(parameters, recipe.optim, num_steps=updates, dtype=dtype)
        reference = reference_of(model.decoder, adapter) if needs_reference(recipe.method) else None
        engine = Engine(model.decoder, slots=recipe.slots, max_positions=model.decoder.max_positions)
        journal = GradeJournal(run, since=since)
        rollouts = LocalRollouts(
            model,
            engine,
            sampling=sampling,
            bounds=bounds_of(model, max_turns=recipe.max_turns, max_length=recipe.max_length),
            samples=recipe.samples_per_prompt,
            seed=recipe.seed,
            judge=phase.around("grade", JournalledGrades(grader, journal)),
        )
        trainer = Trainer(
            recipe=recipe,
            decoder=model.decoder,
            reference=reference,
            learner=learner,
            source=rollouts,
            problems=lambda step, refill, count: draw(task, count, seed=recipe.seed, step=step, refill=refill),
            weights=lambda: WeightsRef(version=learner.num_updates, hash=fingerprint(learner.compute)),
            phase=phase,
            watch=UnknownWatch(),
        )
        yield Session(
            recipe=recipe,
            model=model,
            adapter=adapter,
            task=task,
            engine=engine,
            grader=grader,
            learner=learner,
            rollouts=rollouts,
            trainer=trainer,
            sampling=sampling,
            journal=journal,
        )


def adapter_of(model: Model, recipe: GroupRL) -> Adapter:
    """A new adapter on a model, drawn from the run's seed."""
    adapter = Adapter(cast(torch.nn.Module, model.decoder), model.sites, recipe.lora, seed=recipe.seed)
    shapes = {entry.name: entry.shape for shard in model.folder.shards for entry in shard.entries}
    adapter.factors().check(shapes, where=f"LoRA on {model.name}")  # else the merged model could not be written
    return adapter


def reference_of(decoder: Decoder, adapter: Adapter | None) -> Decoder:
    """The policy as it is before the first step, and stays."""
    return frozen_copy(decoder) if adapter is None else BaseDecoder(decoder, adapter)


def start_weights(session: Session) -> Mapping[str, Tensor]:
    """All that decides what is sampled: the model's weights, and what learns beside them."""
    return dict(session.model.decoder.named_parameters()) | session.learner.compute


def save_results(session: Session, run: RunDir) -> None:
    """Write `model/`, from the fp32 masters; of a run with an adapter `adapter/` before it, and `model/` is the merged
    model, in the dtypes of the folder it came from."""
    masters = session.learner.masters
    if session.adapter is None:
        session.model.save(run.folder / "model", weights=masters)
        return
    factors = session.adapter.factors(masters)
    shutil.rmtree(run.folder / "adapter", ignore_errors=True)  # of a run that was killed between the two
    save_adapter(run.folder / "adapter", factors, base=session.recipe.model)
    session.model.save(run.folder / "model", change=factors.merged)


class PhaseLog:
    """What the run is doing, one word a line in `log.txt`: where a killed run stood can be read there."""

    def __init__(self, run: RunDir) -> None:
        self._file = open(run.folder / "log.txt", "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (lives with the run)
        self.step = 0

    def __enter__(self) -> "PhaseLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __call__(self, name: str) -> None:
        self._file.write(f"{self.step} {name}\n")

    def around(self, name, function):
        """The function, announced."""

        def announced(*args):
            self(name)
            return function(*args)

        return announced


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """A hash of weights, names and order: changed by any single value, and by values that change places.

    Within a row of 64-bit words: a sum over odd numbers times the words, modulo 2^64, on the device that holds them.
    Over rows and the rest: blake2b.
    """
    odd_C = torch.tensor([signed(splitmix64(0, i) | 1) for i in range(FINGERPRINT_WORDS)])
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in parameters.items():
        bytes_N = parameter.detach().flatten().view(torch.uint8)
        whole = len(bytes_N) // (8 * FINGERPRINT_WORDS) * 8 * FINGERPRINT_WORDS
        words_RC = bytes_N[:whole].view(torch.int64).unflatten(0, (-1, FINGERPRINT_WORDS))
        digest.update(f"{name}\n{len(bytes_N)}\n".encode())
        digest.update(row_sums(words_RC, odd_C.to(words_RC.device)).cpu().numpy().data)
        digest.update(bytes_N[whole:].cpu().numpy().data)
    return digest.hexdigest()


def row_sums(words_RC: Int[Tensor, "R C"], factor_C: Int[Tensor, "C"]) -> Int[Tensor, "R"]:
    """words @ factor, modulo 2^64; a GPU has no matrix product of integers."""
    return words_RC @ factor_C if words_RC.device.type == "cpu" else (words_RC * factor_C).sum(1)


@torch.no_grad()
def self_test(session: Session, listener: Listener) -> None:
    """Change the weights a little and see the sampler change, then put them back.

    Guards against the commonest silent failure of all: rollouts that come from other weights than those that learn.
    Raises RungError where the sampler did not notice.
    """
    listener(Progress(stage="self_test", total=1))
    problem = draw(session.task, 1, seed=session.recipe.seed, step=0)[0]
    tokens = min(SELF_TEST_TOKENS, session.recipe.max_tokens)  # there is room for no more
    request = GroupRequest(
        prompt_ids=session.model.prompt_ids(problem.messages),
        keys=tuple(derive_key(session.recipe.seed, "self_test", number) for number in range(8)),
        sampling=Sampling(max_tokens=tokens, temperature=session.recipe.temperature),
    )

    def logps() -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        (completions,), _ = session.engine.run([request])
        return [(completion.token_ids, completion.logp_raw) for completion in completions]

    matrices = [p for name, p in session.learner.compute.items() if p.ndim == 2 and not name.endswith("lora_A")]
    weight = matrices[len(matrices) // 2]  # in the middle of the network
    for _ in range(-(-PACK_AFTER // tokens)):  # until what the sampler keeps of the weights is in use
        logps()
    kept, before = weight.detach().clone(), logps()
    if session.adapter is None:
        weight.mul_(1 + SELF_TEST_CHANGE)
    else:  # B is zero at the start
        weight.add_(SELF_TEST_CHANGE / session.adapter.spec.scaling)
    changed = logps()
    weight.copy_(kept)
    after = logps()
    if changed == before or after != before:
        raise RungError(
            "self-test failed: the sampler does not follow the learner's weights"
            + (" (a changed weight left its log-probabilities as they were)." if changed == before else " back.")
        )
    listener(Progress(stage="self_test", done=1, total=1))
