"""Words to dataclasses, on a made-up dataclass with every kind of field."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest

from rung.cli.options import Option, changed, help_text, options_of, parse, read
from rung.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What drives it.

    power: in kilowatts
    fuel: what it burns: coal, oil or wood
    """

    power: float = 1.5
    fuel: Literal["coal", "oil", "wood"] = "coal"


@dataclass(frozen=True, kw_only=True)
class Train:
    """A train
    on rails.

    Not for roads.

    wheels, doors: how many
        of them
    name: painted on its side
    """

    wheels: int = 8
    doors: int = 0
    name: str = ""
    loud: bool = True
    engine: Engine = field(default_factory=Engine)
    extras: Mapping[str, int | float | str | bool] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trip:
    """A trip."""

    start: str
    stops: tuple[str, ...]
    fare: int = 3


DEFAULT = Train(wheels=6, engine=Engine(power=2.0), extras={"bells": 2, "colour": "red"})
OPTIONS = options_of(Train, DEFAULT, more=[Option(path=("extras", "horns"), kind=int, default=1)])


def test_a_key_that_holds_a_whole_number_still_takes_what_its_task_takes():
    default = Train(extras={"bonus": 1})
    more = [Option(path=("extras", "bonus"), kind=float, default=0.5)]
    (option,) = [option for option in options_of(Train, default, more=more) if option.path == ("extras", "bonus")]
    assert (option.kind, option.default) == (float, 1)


def given(words):
    return changed(DEFAULT, parse(words.split(), OPTIONS, command="build"))


def test_every_kind_of_field_is_set_by_its_words():
    built = given("--wheels 4 --name=Flying-Scotsman --no-loud --engine.power 7 --engine.fuel oil --extras.bells 5")
    assert built == Train(
        wheels=4,
        name="Flying-Scotsman",
        loud=False,
        engine=Engine(power=7.0, fuel="oil"),
        extras={"bells": 5, "colour": "red"},
    )
    assert isinstance(built.engine.power, float)


def test_what_is_not_typed_keeps_the_default_of_the_instance_not_of_the_class():
    assert given("") == DEFAULT
    assert given("--doors 2").wheels == 6


def test_a_key_that_the_mapping_lacks_is_set_only_when_it_is_typed():
    assert "horns" not in given("--doors 1").extras
    assert given("--extras.horns 3").extras["horns"] == 3


def test_the_last_of_two_equal_options_counts():
    assert given("--doors 1 --doors 2 --no-loud --loud") == given("--doors 2")


def test_values_may_begin_with_a_dash_and_places_after_two_dashes_too():
    assert given("--doors -1").doors == -1
    assert given("--name -x").name == "-x"
    assert given("--name=--doors").name == "--doors"
    assert read(Trip, ["a", "--", "--fare", "-b"], command="go") == Trip(start="a", stops=("--fare", "-b"))


def test_arguments_are_taken_by_place_and_options_may_stand_between():
    assert read(Trip, ["a", "--fare", "9", "b", "c"], command="go") == Trip(start="a", stops=("b", "c"), fare=9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--wheel 4", "build has no option --wheel. Did you mean --wheels?"),
        ("--power 4", "build has no option --power. Did you mean --engine.power?"),
        ("--extras.bell 4", "build has no option --extras.bell. Did you mean --extras.bells?"),
        ("--no-lou", "build has no option --no-lou. Did you mean --no-loud?"),
        ("--qqq=4", "build has no option --qqq. `build --help` lists them."),
        ("--wheels", "--wheels needs a whole number after it."),
        ("--wheels --doors 3", "--wheels needs a whole number after it."),
        ("--wheels 4.5", "--wheels needs a whole number, got '4.5'."),
        ("--engine.power fast", "--engine.power needs a number, got 'fast'."),
        ("--engine.power nan", "--engine.power needs a finite number, got 'nan'."),
        ("--engine.power=1e999", "--engine.power needs a finite number, got '1e999'."),
        ("--engine.fuel x", "--engine.fuel needs one of coal, oil, wood, got 'x'."),
        ("--engine.fuel woood", "--engine.fuel needs one of coal, oil, wood, got 'woood'. Did you mean 'wood'?"),
        ("--loud=yes", "--loud takes no value: write --loud or --no-loud."),
        ("extra", "build takes no further argument, got 'extra'. See `build --help`."),
    ],
)
def test_a_mistake_is_answered_with_what_was_needed_what_came_and_what_was_meant(words, message):
    with pytest.raises(ConfigError) as caught:
        given(words)
    assert str(caught.value) == message


def test_missing_arguments_are_named():
    with pytest.raises(ConfigError, match=r"go needs START and STOPS\.\.\.\. See `go --help`"):
        read(Trip, [], command="go")
    with pytest.raises(ConfigError, match=r"go needs STOPS\.\.\."):
        read(Trip, ["a"], command="go")


def test_help_says_of_every_option_what_it_means_and_what_it_is_otherwise(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = help_text("build", "", {"options": OPTIONS})
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  --")}
    assert list(lines) == [option.flag.replace("loud", "[no-]loud") for option in OPTIONS]
    for flag, said in {
        "--wheels": "how many of them (default: 6)",  # one line of the docstring for two fields, and continued
        "--doors": "how many of them (default: 0)",  # zero is a default too
        "--name": "painted on its side",
        "--[no-]loud": "(default: yes)",  # what is on can be switched off
        "--engine.power": " FLOAT in kilowatts (default: 2.0)",
        "--engine.fuel": " NAME what it burns: coal, oil or wood (default: coal)",
        "--extras.bells": " INT (default: 2)",
    }.items():
        assert " ".join(lines[flag].split()).endswith(said), lines[flag]


@pytest.mark.parametrize("columns", [40, 80, 300])
def test_no_line_of_a_help_text_is_wider_than_the_terminal_or_than_can_be_read(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_text("build", "words " * 40, {"options": OPTIONS})
    assert max(map(len, text.splitlines())) <= max(min(columns, 100), 56)
