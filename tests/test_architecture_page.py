"""docs/architecture.md is the twin of the tree and of the import contract."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STOREYS, ROOMS = re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_storeys_on_the_page_are_those_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["name"].startswith("The storeys"))
    names = {folder.name for folder in (ROOT / "rung").iterdir() if (folder / "__init__.py").is_file()}
    on_page = [[word for word in re.findall(r"\w+", line) if word in names] for line in STOREYS.splitlines()]
    # in a line the names come first; a word of the explanation may be a name too ("model", "text")
    wanted = [re.findall(r"rung\.(\w+)", layer) for layer in layers]
    assert [set(found) >= set(layer) for found, layer in zip(on_page, wanted, strict=True)] == [True] * len(wanted)
    assert [found[0] for found in on_page] == [layer[0] for layer in wanted]


def test_every_file_is_on_the_page_and_every_file_on_the_page_exists():
    rooms = re.split(r"^rung/(\w+)/", ROOMS, flags=re.MULTILINE)[1:]
    on_page = {
        (room, name)
        for room, text in zip(rooms[::2], rooms[1::2], strict=True)
        for name in re.findall(r"\w+\.py", text)
    }
    files = (path.relative_to(ROOT / "rung").parts for path in (ROOT / "rung").rglob("*.py"))
    there = {(parts[0], parts[-1]) for parts in files if len(parts) > 1 and parts[-1] != "__init__.py"}
    assert there - on_page == set(), "files that docs/architecture.md does not name"
    assert on_page - there == set(), "files that docs/architecture.md names and nobody finds"
