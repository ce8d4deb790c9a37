"""What the documents say can be done, can be done: code runs, commands exist, links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rung.cli.main import VERBS
from rung.cli.train import read

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
SECONDS = 300  # for one example on a busy machine; a person waits less than a minute
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")


def code_blocks(text: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text) if name == language]


def commands(text: str) -> list[list[str]]:
    """Every `make ...` and `rung ...` of a page, in blocks and in running text, as words without comments."""
    shell = "\n".join(body for name, body in FENCE.findall(text) if name in ("sh", "bash", "console", "shell"))
    lines = [line.strip().removeprefix("$ ") for line in shell.splitlines()] + INLINE.findall(FENCE.sub("", text))
    typed = [re.split(r"[<>|]", part)[0].strip() for line in lines for part in re.split(r"&&|;", line)]
    return [shlex.split(line, comments=True) for line in typed if re.match(r"(make|rung)(\s|$)", line)]


def complaint(words: list[str]) -> str:
    """Why a person who typed these words would be disappointed; empty where they would not."""
    if words[0] == "make":
        named = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        missing = [word for word in named if word not in _targets()]
        return f"make has no target {missing[0]!r}" if missing else ""
    if len(words) < 2 or words[1].startswith("-") or words[1].isupper():  # a placeholder
        return ""
    if words[1] not in VERBS:
        return f"rung has no verb {words[1]!r}"
    their_own = any(re.search(r"\.(py|json|toml)\b|\.\.\.|^[A-Z]+$", word) for word in words)
    if words[1] == "train" and len(words) > 2 and words[2].isidentifier() and not their_own:
        try:
            read(words[2:])
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("number", range(len(code_blocks(README.read_text(), "python"))))
def test_the_code_of_the_readme_runs_as_it_stands(number, tmp_path):
    code = code_blocks(README.read_text(), "python")[number]
    one_core = (
        f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n"  # two, shared, are far slower
    )
    command = [sys.executable, "-c", one_core + code]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ran.returncode == 0, f"{code}\n{ran.stdout}\n{ran.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_that_a_page_names_exists(page):
    found = [(words, complaint(words)) for words in commands(page.read_text())]
    assert not [(shlex.join(words), why) for words, why in found if why]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_to_a_file(page):
    links = [link for link in LINK.findall(FENCE.sub("", page.read_text())) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ("```sh\nmake nothing   # a comment\n```", "no target 'nothing'"),
        ("Then `make run STEPS=3 flying`.", "no target 'flying'"),
        ("```console\n$ rung sing\n```", "no verb 'sing'"),
        ("`rung train arithmatic > x.json`", "arithmatic"),
        ("`rung train arithmetic --nmae x`", "nmae"),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(page, why):
    [words] = commands(page)
    assert why in complaint(words)


def test_a_command_that_exists_is_accepted():
    page = "```sh\nmake run STEPS=3\nrung --help\nls\n```\n`rung train arithmetic --name x`, `make`, `makeshift`"
    found = commands(page)
    assert len(found) == 4
    assert [complaint(words) for words in found] == ["", "", "", ""]


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
