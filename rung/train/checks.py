"""What is tried before a run has a folder: that its task has every problem it will ask, and that they fit the model."""

from collections.abc import Sequence
from itertools import product

from rung.core.errors import ConfigError, ModelError, TaskError
from rung.core.progress import Listener, silent
from rung.core.words import Message, Problem, spoken
from rung.lm.adapters.peft import is_adapter
from rung.lm.weights.sources import locate
from rung.model.model import Model, is_foreign, outline
from rung.tasks.base import Split, Task, problem_at, problems, split_of, where
from rung.tasks.load import RewardTask
from rung.tasks.maths import Maths
from rung.tasks.mixture import Mixture, parts_of
from rung.tasks.rewards import Rewards
from rung.train.config import GroupRL
from rung.train.rollouts import bounds_of, prompt_of
from rung.train.turns import GOES_ON

LOOKED_AT = 64  # problems of a split, where the task makes them; a list is read to its end
LISTS = (RewardTask, Rewards, Maths)


def check_problems(recipe: GroupRL, task: Task, listener: Listener = silent) -> None:
    """Raises TaskError for an empty part that the run will ask, and for a problem that is too long for the model;
    ConfigError for a task of several turns where one is wanted."""
    if recipe.max_turns == 1:
        _refuse_several_turns(task)
    model = weightless(recipe, listener)
    bounds = bounds_of(model, max_turns=recipe.max_turns, max_length=recipe.max_length)
    splits: list[Split] = ["train", "held_out"]
    if 0 < recipe.eval_every < recipe.num_steps:
        splits.append("validation")
    asked: list[Problem] = []
    for split in splits:
        try:
            asked += problems(task, split, LOOKED_AT)
        except TaskError as error:
            if split != "validation":
                raise
            raise TaskError(
                f"{error}. eval_every = {recipe.eval_every} asks validation problems: set it to 0 to do without"
            ) from error
    for part in parts_of(task):
        listed = [problem_at(part, index) for index in range(len(part))] if isinstance(part, LISTS) else []
        asked += [problem for problem in listed if split_of(problem) in splits]
    if isinstance(task, Mixture):
        _refuse_leak(asked)
    for problem in {problem.messages: problem for problem in asked}.values():
        prompt_of(model, problem, recipe.max_tokens, bounds.max_length)


def _refuse_leak(asked: Sequence[Problem]) -> None:
    """Parts of a mixture split their own problems; one that two of them have must lie in the same part of both."""
    of: dict[tuple[tuple[Message, ...], str], Problem] = {}
    for problem in asked:
        if problem.answer is None:
            continue
        other = of.setdefault((problem.messages, problem.answer), problem)
        if (one := split_of(other)) != (two := split_of(problem)):
            raise TaskError(
                f"{problem.messages[-1].content[:80]!r} is a {one} problem in one part of the mixture, and a {two} "
                "problem in another: what is learnt would be measured. Give both the same split."
            )


def _refuse_several_turns(task: Task) -> None:
    """A task that goes on after an answer is told apart before a run is made; what this misses, the run itself refuses.

    Nothing that a model said is tried here, only an empty answer and the known-good one."""
    for part, text in product(parts_of(task), ("", None)):
        problem = problem_at(part, 0)
        said = (problem.answer or "") if text is None else text
        try:
            reply = part.reply(problem, spoken((*problem.messages, Message("assistant", said))))
        except (Exception, SystemExit) as error:
            raise TaskError(f"the reply of the task {type(part).__name__} failed: {where(error, '')}") from error
        if reply is not None:
            raise ConfigError(GOES_ON)


def weightless(recipe: GroupRL, listener: Listener = silent) -> Model:
    """The recipe's model as far as its shape and its tokenizer go; no tensor of it is read.

    Raises ModelError for an adapter, ConfigError where the model cannot do what the recipe asks of it."""
    path = locate(recipe.model, listener)
    if is_adapter(path):
        raise ModelError(
            f"{path} is an adapter: a run starts from a whole model, so that its reference is what it starts from. "
            'Write it first: rung.load(adapter, dtype="fp32").save(folder).'
        )
    if recipe.activation_checkpointing and is_foreign(recipe.model, foreign=recipe.foreign):
        raise ConfigError(
            f"activation_checkpointing needs a family of Rung's own, and {recipe.model} goes through transformers: "
            "leave it off, and lower tokens_per_micro_batch where memory is short."
        )
    return outline(recipe.model, foreign=recipe.foreign, listener=listener)
