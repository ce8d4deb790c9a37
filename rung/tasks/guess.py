"""A game of several turns: find a number; after every guess the environment says whether it is higher or lower.

The guess of an answer is its **last number** (`rung.tasks.arithmetic`).  A problem is solved when some answer is the
number, within the guesses that are allowed; the environment's words are not the model's, and are not trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rung.core.errors import TaskError
from rung.core.words import Answer, Grade, Message, Problem
from rung.tasks.arithmetic import last_number
from rung.tasks.base import problem_id


@dataclass(frozen=True, kw_only=True)
class Guess:
    """All numbers from 1 to `highest`, each to be found in `guesses` answers.

    highest: the largest number; halving finds every number in log2(highest) guesses, rounded up
    guesses: answers that an episode may have; max_turns of the run should be as many
    prompt:  the user's message; {highest} and {guesses} stand for the options
    """

    highest: int = 100
    guesses: int = 7
    prompt: str = "I think of a whole number from 1 to {highest}. You have {guesses} guesses. Say one number."

    def __post_init__(self) -> None:
        if not (2 <= self.highest <= 10**9 and 1 <= self.guesses <= 1000):
            raise TaskError(
                f"guess needs a highest number of 2 to 1000000000 and 1 to 1000 guesses, and got {self.highest} and "
                f"{self.guesses}"
            )

    def __len__(self) -> int:
        return self.highest

    def problem(self, index: int) -> Problem:
        text = self.prompt.replace("{highest}", str(self.highest)).replace("{guesses}", str(self.guesses))
        return Problem(
            id=problem_id(f"guess {self.highest} {index + 1}"),
            messages=(Message("user", text),),
            answer=str(index + 1),
            task="guess",
        )

    def reply(self, problem: Problem, messages: Sequence[Message]) -> list[Message] | None:
        said = _guesses(messages[len(problem.messages) :])
        if said[-1] == problem.answer or len(said) >= self.guesses:
            return None
        return [Message("user", _hint(said[-1], problem))]

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        return [self._grade(answer) for answer in answers]

    def _grade(self, answer: Answer) -> Grade:
        said = _guesses(answer.messages[len(answer.problem.messages) :])
        found = said[-1] == answer.problem.answer
        return Grade(score=float(found), right=found, parts={"guesses": float(len(said))})


def _guesses(messages: Sequence[Message]) -> list[str | None]:
    return [last_number(message.content) for message in messages if message.role == "assistant"]


def _hint(guess: str | None, problem: Problem) -> str:
    said, secret = guess or "", problem.answer or ""
    if not said.isdigit():
        return "Say a whole number."
    return "lower" if (len(said), said) > (len(secret), secret) else "higher"  # no int(), which refuses 5000 digits
