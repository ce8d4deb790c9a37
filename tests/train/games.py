"""Tasks of several turns that a tiny model can learn, in a file as a user would write it."""

from pathlib import Path

from train.tiny import tiny_recipe

from rung.train.config import GroupRL, Method, Optim, TaskSpec

GAME = '''"""First say one letter, then, when asked for it, another."""

import itertools

from rung.core.words import Grade, Message, Problem

asked = itertools.count()


class Game:
    """letters: what each answer should say; moody: the environment's words change with every call."""

    def __init__(self, *, letters: str = "ab", moody: bool = False):
        self.letters, self.moody = letters, moody

    def __len__(self):
        return 40

    def problem(self, index):
        return Problem(id=f"game {index}", messages=(Message("user", f"a{index}"),), answer="a")

    def reply(self, problem, messages):
        said = [m.content for m in messages if m.role == "assistant"]
        if len(said) >= len(self.letters):
            return None
        return [Message("user", f"next {next(asked)}" if self.moody else self.letters[len(said)])]

    def grade(self, answers):
        grades = []
        for answer in answers:
            said = [m.content for m in answer.messages if m.role == "assistant"]
            parts = [text.count(letter) / max(len(text), 1) for text, letter in zip(said, self.letters)]
            grades.append(Grade(score=sum(parts) / len(self.letters), right=sum(parts) == len(self.letters)))
        return grades
'''


def game_recipe(folder: Path, *, options=None, **changes) -> GroupRL:
    """The tiny recipe on the game; its file lies beside the model."""
    (folder.parent / "game.py").write_text(GAME)
    values = {
        "task": TaskSpec(name=f"{folder.parent / 'game.py'}:Game", options=options or {}),
        "max_turns": 4,
        "max_tokens": 3,
        "method": Method(advantage="mean", denominator="constant"),
        "optim": Optim(lr=3e-2),
        "eval_every": 0,
    }
    return tiny_recipe(folder, **(values | changes))
