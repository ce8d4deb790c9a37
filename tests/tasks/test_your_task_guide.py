"""The page "Bring your own task", as it stands."""

import re
from pathlib import Path

from rung.cli.train import load_recipe, read
from rung.core.words import Answer
from rung.tasks.load import load_task
from rung.tasks.sandbox import Grader

PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "your_task.md").read_text()


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def test_the_files_and_commands_of_the_page_work_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rewards, recipe = blocks("python")
    Path("questions.jsonl").write_text(blocks("json")[0])
    Path("rewards.py").write_text(rewards)
    Path("mine.py").write_text(recipe)
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("rung train")]
    assert len(commands) == 2
    for command, texts in zip(commands, (("Answer: 7.0", "Answer: 8"), ("so 3 + 4 = 7\n#### 7", "8")), strict=True):
        _, asked = read(command.split()[2:])
        task = load_task(asked.task.name, asked.task.options)
        with Grader(asked.task.name, asked.task.options, asked.grading) as grader:
            answers = [Answer(problem=task.problem(0), text=text, stop="eos", num_tokens=1) for text in texts]
            assert [grade.right for grade in grader.grade(answers)] == [True, False]
    mixed = load_recipe("mine.py:mixed").task
    task = load_task(mixed.name, mixed.options)
    assert {task.problem(n).task for n in range(0, len(task), 7)} == {"sums", "mine"}
