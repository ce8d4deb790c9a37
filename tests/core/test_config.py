import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rung.core import config
from rung.core.errors import ConfigError
from rung.train.config import METHODS, GroupRL, Method, TaskSpec


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    kind: Literal["plain", "fancy"] = "plain"
    note: str | None = None
    level: Literal[1, 2] = 1


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = ()
    pair: tuple[str, float] = ("a", 1.0)
    table: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    nested: Mapping[str, tuple[Inner, ...]] = field(default_factory=dict)
    limit: int | None = None
    on: bool = False

    def __post_init__(self):
        if self.limit == 13:
            raise ConfigError("limit must not be 13")


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
INNERS = st.builds(
    Inner, rate=FLOATS, kind=st.sampled_from(["plain", "fancy"]), note=st.none() | st.text(st.characters())
)
SCALARS = st.integers() | FLOATS | st.text() | st.booleans()
OUTERS = st.builds(
    Outer,
    name=st.text(st.characters()),  # surrogates too: a file name may hold them
    inner=INNERS,
    sizes=st.lists(st.integers()).map(tuple),
    pair=st.tuples(st.text(), FLOATS),
    table=st.dictionaries(st.text(), SCALARS),
    nested=st.dictionaries(st.text(), st.lists(INNERS, max_size=2).map(tuple), max_size=2),
    limit=st.none() | st.integers(14),
    on=st.booleans(),
)


def kinds(value):
    """The value with the type of every leaf, because 1 == 1.0 == True."""
    if isinstance(value, dict):
        return {name: kinds(item) for name, item in value.items()}
    return [kinds(item) for item in value] if isinstance(value, list) else (type(value), value)


@given(OUTERS)
def test_every_value_reads_back_equal_from_json_down_to_the_type_of_each_leaf(value):
    back = config.from_dict(Outer, json.loads(config.dumps_json(value)))
    assert back == value
    assert kinds(config.to_dict(back)) == kinds(config.to_dict(value))


@given(OUTERS, OUTERS)
def test_the_difference_is_empty_exactly_where_the_written_values_are_equal(a, b):
    assert config.diff(a, a) == {}
    assert (config.diff(a, b) == {}) == (without_empty(config.to_dict(a)) == without_empty(config.to_dict(b)))


def without_empty(data):
    return {k: v for k, item in data.items() if (v := without_empty(item) if isinstance(item, dict) else item) != {}}


def test_a_file_of_either_kind_reads_as_the_recipe_it_describes(tmp_path):
    recipe = GroupRL(
        name="x",
        task=TaskSpec(name="arithmetic", options={"digits": 3, "operations": "+-"}),
        seed=7,
        dtype="fp32",
        method=replace(METHODS["dapo"], eps_high=0.3),
    )
    (tmp_path / "a.json").write_text(config.dumps_json(recipe))
    (tmp_path / "a.toml").write_text(
        'schema = 1\nname = "x"\nseed = 7\ndtype = "fp32"\n'
        '[task]\nname = "arithmetic"\noptions = {digits = 3, operations = "+-"}\n'
        '[method]\nadvantage = "std"\nsurrogate = "clip"\neps_high = 0.3\ndenominator = "tokens"\n'
        'dynamic_sampling = true\noverlong = "shape"\n'
    )
    assert config.load(tmp_path / "a.json", GroupRL) == config.load(tmp_path / "a.toml", GroupRL) == recipe


def test_a_whole_number_is_a_float_where_a_float_is_wanted_and_stays_whole_in_a_mixed_table():
    value = config.from_dict(Outer, {"schema": 1, "name": "x", "inner": {"rate": 1}, "table": {"a": 1, "b": 1.0}})
    assert type(value.inner.rate) is float
    assert [type(v) for v in value.table.values()] == [int, float]


BAD = {
    "a misspelt field": ({"nme": "x"}, "nme is unknown: Outer has no such field. Did you mean 'name'?"),
    "a misspelt field below": ({"inner": {"rat": 1}}, "inner.rat is unknown: Inner has no such field. Did you mean"),
    "a wrong type": ({"inner": {"rate": "fast"}}, "inner.rate must be a finite number, and is 'fast' (str)"),
    "a bool for a number": ({"sizes": [1, True]}, "sizes[1] must be a whole number, and is True (bool)"),
    "a float for a whole number": ({"limit": 2.5}, "limit must be a whole number, and is 2.5 (float)"),
    "a number for a bool": ({"on": 1}, "on must be true or false, and is 1 (int)"),
    "a misspelt choice": ({"inner": {"kind": "fany"}}, "inner.kind must be one of 'plain', 'fancy', and is 'fany'."),
    "a choice of another type": ({"inner": {"kind": 3}}, "inner.kind must be one of 'plain', 'fancy', and is 3."),
    "an unhashable choice": ({"inner": {"kind": ["plain"]}}, "inner.kind must be one of"),
    "a choice that is only equal": ({"inner": {"level": True}}, "inner.level must be one of 1, 2, and is True."),
    "a bool for an optional number": ({"limit": True}, "limit must be a whole number, and is True (bool)"),
    "an infinite number in a table": ({"table": {"x": math.inf}}, "table.x must be"),
    "a text for a list": ({"sizes": "12"}, "sizes must be a list, and is '12' (str)"),
    "a pair of three": ({"pair": ["a", 1.0, 2.0]}, "pair must be a list of 2 values, and has 3"),
    "a list in a table of scalars": ({"table": {"x": [1]}}, "table.x must be a whole number or a finite number or"),
    "an infinite number": ({"inner": {"rate": math.inf}}, "inner.rate must be a finite number, and is inf"),
    "a number too large for a float": ({"inner": {"rate": 10**400}}, "inner.rate must be a finite number"),
    "a value that the class refuses": ({"limit": 13}, "limit must not be 13"),
    "nothing where something is needed": ({"inner": None}, "inner must be a table, and is None"),
    "another schema": ({"schema": 2}, "this version of Rung reads schema 1, and the configuration has schema 2"),
    "a schema that is true": ({"schema": True}, "has schema True"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_message_names_the_path_and_what_came(case):
    change, message = BAD[case]
    with pytest.raises(ConfigError) as error:
        config.from_dict(Outer, {"schema": 1, "name": "x"} | change)
    assert message in str(error.value)


def test_a_missing_field_and_a_missing_schema_are_named():
    with pytest.raises(ConfigError, match=r"^name is missing: Outer needs it"):
        config.from_dict(Outer, {"schema": 1})
    with pytest.raises(ConfigError, match="needs `schema = 1` at its top"):
        config.from_dict(Outer, {"name": "x"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"schema": 1, "name": }', "is not valid JSON: .*line 1 column"),
        ("a.toml", "schema = 1\nname = \n", "is not valid TOML: .*line 2"),
        ("a.json", '{"schema": 1, "schema": 1}', "is not valid JSON: the name 'schema' stands in it twice"),
        ("a.json", "[1]", "must hold a table"),
        ("a.json", b"\xff\xfe", "is not valid JSON"),
        ("a.json", '{"schema": 1, "name": 5}', "a.json: name must be a string"),
        ("a.yaml", "", "ends in .json or .toml, this one in '.yaml'"),
        ("a.json", None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as error:
        config.load(tmp_path / name, Outer)
    assert str(error.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("value", [print, object(), {1: 2}, math.nan, 1j])
def test_what_is_not_a_value_cannot_be_written(value):
    with pytest.raises(ConfigError, match=r"^inner\.deep\.x must "):
        config.encode({"inner": {"deep": {"x": value}}})


def test_a_difference_has_dotted_paths_and_both_values():
    a = Outer(name="x", table={"only": 1}, sizes=(1, 2))
    b = replace(a, inner=Inner(rate=0.25), table={}, sizes=(1, 3))
    assert config.diff(a, b) == {"inner.rate": (0.5, 0.25), "table.only": (1, None), "sizes": ([1, 2], [1, 3])}
    assert config.diff(b, a) == {"inner.rate": (0.25, 0.5), "table.only": (None, 1), "sizes": ([1, 3], [1, 2])}


def test_methods_of_the_spine_survive_the_trip():
    for method in METHODS.values():
        assert config.from_dict(Method, config.to_dict(method)) == method


def test_configurations_load_without_torch():
    code = "import rung.core.config, rung.core.rundir, rung.core.journal, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
