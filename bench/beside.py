"""What a recipe's gain is measured beside: prompting, random rewards, supervision; for sums, longer ones.

    python -m bench.beside runs/arithmetic

Takes a finished run, and prints greedy accuracies on the same held-out problems: of the base model under a lenient
parser and with four solved examples; of the same recipe with coin flips for rewards; of supervised fine-tuning for as
many minutes as the run's steps took; and, for `arithmetic`, of three-digit sums, which nobody trained on.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench import beside_tasks
from bench.harness import machine, record
from bench.ours import completion_of
from rung.cli.display import Display
from rung.core.rundir import open_run
from rung.model.model import Model, compute_dtype, load
from rung.tasks.base import draw
from rung.tasks.load import load_task
from rung.train.config import GroupRL, Method, TaskSpec
from rung.train.data import count, pack, sample_of
from rung.train.evaluate import Evaluation, evaluate
from rung.train.methods import build_objective, group_streams
from rung.train.policy import LanguagePolicy
from rung.train.run import train
from rung.train.session import use_threads
from rung.train.step import Learner

SUPERVISED = Method(advantage="none", surrogate="pg", denominator="tokens")  # reward 1: minus the mean log-likelihood
SUPERVISED_BATCH, SUPERVISED_LR, TIMED_STEPS = 64, 2e-5, 6
PARTS = ("prompting", "supervised", "random")
LENIENT_TOKENS = 64  # for the parser that takes any number: room to think aloud


def main() -> None:
    """All of it, one line each; about four times the run's own minutes, half of them with random rewards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run whose answers are numbers")
    parser.add_argument("--only", choices=PARTS, default="", help="one part")
    given = parser.parse_args()
    folder = given.run
    run = open_run(folder)
    recipe = run.config(GroupRL)
    minutes = sum(r["seconds"] for r in run.read("metrics") if r["kind"] == "train") / 60
    use_threads(recipe.threads)
    print(", ".join(f"{name} {value}" for name, value in machine(recipe.threads).items()))
    print(f"{folder}: {recipe.num_steps} steps, {minutes:.1f} minutes; seed {recipe.seed}", flush=True)
    for what, result in results(recipe, folder, minutes, given.only):
        print(f"{what:<72} {result.accuracy:6.1%}  ({result.low:.1%} to {result.high:.1%}, {result.n})", flush=True)
        numbers = {name: getattr(result, name) for name in ("accuracy", "low", "high", "n", "ended")}
        record({"what": f"beside {folder.name}: {what}", **numbers})


def results(recipe: GroupRL, folder: Path, minutes: float, only: str = "") -> Iterator[tuple[str, Evaluation]]:
    """Every measurement with its name, the cheap ones first."""
    own = recipe.task
    if only in ("", "prompting"):
        yield from prompting(recipe, folder)
    if only in ("", "supervised"):
        model = supervised(recipe, minutes)
        yield "supervised for as many minutes", greedy(recipe, model, own)
    if only in ("", "random"):
        coins = replace(recipe, name=f"{folder.name}-random-rewards", task=variant(own, "CoinFlips"))
        with Display() as display:
            flipped = train(coins, folder=folder.parent / coins.name, listener=display, or_resume=True)
        model = load(flipped.folder / "model", dtype=recipe.dtype)
        yield "the same recipe with random rewards", greedy(recipe, model, own)


def prompting(recipe: GroupRL, folder: Path) -> Iterator[tuple[str, Evaluation]]:
    """The base model and the trained one under other prompts, parsers and sums."""
    base, trained = load(recipe.model, dtype=recipe.dtype), load(folder / "model", dtype=recipe.dtype)

    on, own = partial(greedy, recipe), recipe.task
    opened = bool(own.options.get("opening"))
    asked = replace(own, options={**own.options, "opening": ""}) if opened else own
    yield "trained: the recipe's prompt and parser", on(trained, own)
    yield "base: the recipe's prompt and parser", on(base, own)
    yield "base: any number of the text may be right", on(base, variant(own, "AnyNumber"))
    if opened:
        yield "base: any number, 64 tokens, no opening", on(base, variant(asked, "AnyNumber"), LENIENT_TOKENS)
    yield "base: 4 shots, the recipe's parser", on(base, variant(own, "FourShots"))
    yield "base: 4 shots, any number", on(base, variant(own, "FourShotsAnyNumber"))
    if opened:
        yield (
            "base: 4 shots, any number, 64 tokens, no opening",
            on(base, variant(asked, "FourShotsAnyNumber"), LENIENT_TOKENS),
        )
    if own.name == "arithmetic":
        three = replace(own, options={**own.options, "digits": 3})
        yield "base: three-digit sums", on(base, three)
        yield "trained on two digits: three-digit sums", on(trained, three)


def greedy(recipe: GroupRL, model: Model, task: TaskSpec, max_tokens: int | None = None) -> Evaluation:
    """On as many held-out problems as the recipe asks; max_tokens: of an answer, by default the recipe's."""
    limit = recipe.max_tokens if max_tokens is None else max_tokens
    return evaluate(model, task, problems=recipe.eval_problems, max_tokens=limit)


def variant(task: TaskSpec, name: str) -> TaskSpec:
    """The same task, one thing about it changed."""
    return TaskSpec(name=f"{beside_tasks.__file__}:{name}", options={"of": task.name, **task.options})


def supervised(recipe: GroupRL, minutes: float) -> Model:
    """The base model, taught the right answers for so many minutes; the rate falls to zero at the end of them."""
    Tutor(recipe, num_steps=TIMED_STEPS).teach()  # the first steps of a process are slow
    timed = Tutor(recipe, num_steps=TIMED_STEPS).teach() / TIMED_STEPS
    tutor = Tutor(recipe, num_steps=round(60 * minutes / timed))
    taken = tutor.teach()
    print(
        f"  supervised: {tutor.num_steps} steps of {SUPERVISED_BATCH} answers in {taken / 60:.1f} minutes", flush=True
    )
    return tutor.model


class Tutor:
    """Supervised fine-tuning with the run's own learner: a group of one right answer, whose advantage is 1."""

    def __init__(self, recipe: GroupRL, *, num_steps: int) -> None:
        self.num_steps, self.seed = num_steps, recipe.seed
        self.task = load_task(recipe.task.name, recipe.task.options)
        self.model = load(recipe.model, dtype="fp32")
        self.learner = Learner(
            dict(self.model.decoder.named_parameters()),
            replace(recipe.optim, lr=SUPERVISED_LR),
            num_steps=num_steps,
            dtype=compute_dtype(recipe.dtype),
        )

    def teach(self) -> float:
        """All steps; returns seconds."""
        began = time.perf_counter()
        objective, policy = build_objective(SUPERVISED), LanguagePolicy(self.model.decoder)
        tokenizer = self.model.tokenizer
        for step in range(self.num_steps):
            samples = []
            for number, problem in enumerate(draw(self.task, SUPERVISED_BATCH, seed=self.seed, step=step)):
                prompt = self.model.prompt_ids(problem.messages)
                answer = completion_of([*tokenizer.encode(f" {problem.answer}"), tokenizer.eos_ids[0]])
                one = sample_of(prompt, answer, problem_id=problem.id, group_id=number, reward=1.0)
                samples += group_streams(SUPERVISED, [one], max_tokens=len(answer.token_ids))
            batches = pack(samples, counts=count(samples), tokens_per_batch=GroupRL.tokens_per_micro_batch)
            self.learner.step(batches, policy, objective)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
