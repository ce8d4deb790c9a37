"""What the engine's pages say: their code runs, and their table of noise words is the law's."""

import re
from pathlib import Path

from rung.core import rng

GUIDE = Path(__file__).parents[2] / "docs" / "guide"


def test_the_code_of_the_engine_page_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (GUIDE / "engine.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert [len(c.token_ids) for c in names["completions"][0]] == [5, 5]
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_the_words_on_the_noise_page_are_those_of_the_law():
    page = (GUIDE / "noise.md").read_text()
    assert rng.NOISE_LAW in page.splitlines()[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| ([0-9a-f]{16}) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for key, position, index, word in rows:
        seed = rng.mix64(int(key) ^ rng.mix64(int(position)))
        assert rng.splitmix64(seed, int(index)) == int(word, 16)
