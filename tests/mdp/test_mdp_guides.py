"""The code of the guide pages about finite models runs, and prints what can be checked here."""

import re
from pathlib import Path

import numpy as np
import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guide"


def run(page: str) -> list[dict]:
    """Every Python block of a page, each with names of its own."""
    found = []
    for code in re.findall(r"```python\n(.*?)```", (GUIDE / page).read_text(), re.DOTALL):
        found.append({})
        exec(code, found[-1])
    return found


def test_the_page_of_models(capsys):
    (names,) = run("finite.md")
    assert names["answer"].error <= 1e-6
    assert "e-" in capsys.readouterr().out


def test_the_page_of_planning():
    (names,) = run("planning.md")
    assert len(names["errors"]) > 5
    assert np.allclose(names["by_krylov"].v_S, names["directly"].v_S, atol=2e-6)


@pytest.mark.parametrize("page", ["oracle.md", "tabular.md"])
def test_the_other_pages_run(page, capsys):
    assert run(page)
    assert capsys.readouterr().out


def test_the_shell_lines_of_the_planning_page_run(capsys, monkeypatch, tmp_path):
    from rung.cli.main import main

    (tmp_path / "my-grid.txt").write_text("S..\n.#T\n")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```sh\n(.*?)```", (GUIDE / "planning.md").read_text(), re.DOTALL)
    lines = [line.partition("#")[0].split() for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert main(line[1:]) == 0, capsys.readouterr().err
    assert (tmp_path / "grid.svg").exists()
