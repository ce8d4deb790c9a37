"""docs/guide/cli.md holds the help text of every verb, word for word.  `python tests/cli/test_help.py` writes them."""

import io
import os
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

from rung.cli.main import VERBS, main
from rung.cli.train import read

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "cli.md"
BLOCK = re.compile(r"^```text\n\$ rung (.*)\n((?:.*\n)*?)```$", re.MULTILINE)
COLUMNS = "100"


def said(command: str) -> str:
    """What `rung COMMAND` prints on a terminal of COLUMNS columns."""
    os.environ["COLUMNS"] = COLUMNS
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) as stream:
        assert main(command.split()) == 0
        stream.seek(0)
        return stream.read()


def documented() -> dict[str, str]:
    return dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))


def test_the_documented_help_is_the_help_that_is_printed(monkeypatch):
    monkeypatch.setenv("COLUMNS", COLUMNS)
    for command, text in documented().items():
        assert text == said(command), f"`python {Path(__file__).name}` writes the page again"


def test_every_verb_is_documented():
    assert set(documented()) == {"--help", *(f"{verb} --help" for verb in VERBS)}


def test_the_documented_commands_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mytask.py").write_text(
        "class Rhymes:\n    def __init__(self, words: int = 3, strict: bool = True):\n        pass\n"
    )
    shown = "".join(re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    examples = [line for line in shown.splitlines() if line.startswith("rung train ")]
    assert len(examples) >= 5
    for example in examples:
        first, _, second = example.partition(" && ")
        command, _, file = first.partition(" > ")
        asked, recipe = read(shlex.split(command, comments=True)[2:])
        if file:
            (tmp_path / file).write_text(said(command.removeprefix("rung ")))
            assert asked.print_config
            assert read(shlex.split(second)[2:])[1] == recipe


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    page = BLOCK.sub(lambda found: f"```text\n$ rung {found[1]}\n{said(found[1])}```", page)
    PAGE.write_text(page, encoding="utf-8")
