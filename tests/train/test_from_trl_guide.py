"""docs/guide/from_trl.md has every field of the installed GRPOConfig, with its default, and names only what is here."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from rung.cli.main import VERBS
from rung.cli.options import options_of
from rung.cli.train import Train
from rung.train.config import GroupRL, TaskSpec
from rung.train.session import check_recipe

GUIDE = (Path(__file__).parents[2] / "docs" / "guide" / "from_trl.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")
OWN, INHERITED = GUIDE.split("## Fields that GRPOConfig inherits")


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


def rows(text: str) -> list[list[str]]:
    """Cells of the body of a table."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def default_of(field) -> object:
    return field.default if field.default is not MISSING else field.default_factory()


def test_the_table_has_every_field_of_the_installed_config_with_its_default(trl):
    import transformers

    inherited = {field.name for field in fields(transformers.TrainingArguments)}
    theirs = {f"`{f.name}`": f"`{default_of(f)!r}`" for f in fields(trl.GRPOConfig) if f.name not in inherited}
    ours = {name: default for name, default, *_ in rows(OWN)}
    assert set(ours) - set(theirs) == set(), "fields that trl does not have any more"
    assert set(theirs) - set(ours) == set(), "fields of trl that the page does not have"
    assert ours == theirs
    assert len(rows(OWN)) == len(ours), "a field stands there twice"


def test_what_is_said_to_be_inherited_is(trl):
    import transformers

    theirs = {field.name: default_of(field) for field in fields(transformers.TrainingArguments)}
    names = [CODE.findall(name)[0] for name, *_ in rows(INHERITED)]
    assert [name for name in names if name not in theirs] == []
    assert len(set(names)) == len(names)
    config = {field.name: default_of(field) for field in fields(trl.GRPOConfig)}
    said = {"learning_rate": 1e-6, "adam_beta2": 0.999, "adam_beta1": 0.9, "adam_epsilon": 1e-8, "weight_decay": 0.0}
    assert {name: config[name] for name in said} == said
    assert config["max_grad_norm"] == 1.0
    assert str(config["lr_scheduler_type"]).lower().endswith("linear")


def test_every_equal_that_is_named_exists_here_with_that_value():
    here = {
        ".".join(option.path): option
        for option in options_of(GroupRL, GroupRL(name="", task=TaskSpec(name="arithmetic")))
    }
    flags = {option.flag for option in options_of(Train)}
    for row in (*rows(OWN), *rows(INHERITED)):
        equal, remark = row[-2], row[-1]
        assert equal == "\u2013" or CODE.findall(equal), row
        if equal == "\u2013":
            assert remark, f"{row[0]}: no equal, because?"
        for word in CODE.findall(equal):
            known = word in here or word in flags or word.removeprefix("rung ") in VERBS
            assert known, f"{row[0]}: {word}"
        for name, value in re.findall(r"`([a-z_.]+)=([a-z0-9_]+)`", remark):
            assert name in here, f"{row[0]}: {name}"
            assert value in here[name].choices, f"{row[0]}: {name}={value}"


def test_the_recipe_of_the_page_is_one():
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    made: dict = {}
    exec(compile(example, "from_trl.md", "exec"), made)
    check_recipe(made["recipe"])
    assert made["recipe"].prompts_per_step * made["recipe"].samples_per_prompt == 8 * 16
