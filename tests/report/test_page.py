"""The report: whatever a run left behind becomes a page, and nothing a model wrote becomes part of it."""

import base64
import hashlib
import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import ENVIRONMENT, RECIPE, answers, eval_row, finished_run, samples, train_row

from rung.core.errors import RunError
from rung.core.rundir import create
from rung.report import page
from rung.report.load import read_run

VOID = {"meta", "br"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></textarea></title><img src=x onerror=alert(1)>",
    "&lt;b&gt; {{ 7 * 7 }} {% raw %}",
    "\x1b[2J\x1b]0;title\x07 \x00 \u202e \x9b31m \ud800",
    '" onmouseover="alert(1)',
    "]]> --> <!-- <svg onload=alert(1)>",
]


class Parsed(HTMLParser):
    """Every element, its attributes and the text on the page; fails where tags do not match."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.open, self.words = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read(run):
    return Parsed(page.write(run.folder).read_text(encoding="utf-8"))


def test_the_report_shows_what_a_finished_run_did(tmp_path):
    parsed = read(finished_run(tmp_path / "run"))
    for words in (
        "12.4\u202f% → 97.4\u202f%".replace("\u202f", " "),  # 62 and 487 of 500
        "95 % interval",
        "Wilson",
        "finished: 60 steps",
        "Entropy",
        "KL to the reference",
        "Clipped",
        "Groups without signal",
        "Log-probability gap",
        "sampling (decode) 2 min 2.10 s 30.0 %",  # 2.1 of 7 seconds
        "What is 11 + 10?",
        "method.advantage",
        "a made-up machine",
        "rung train",
    ):
        assert words in parsed.text.replace("\u202f", " "), words
    assert parsed.tags.count("svg") == 14  # 13 charts and the bar of times


def test_nothing_a_model_wrote_becomes_part_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAIRS_OF_A_KIND", dict.fromkeys(page.PAIRS_OF_A_KIND, 100))
    clean = read(finished_run(tmp_path / "clean", steps=3))
    run = create(tmp_path / "run", RECIPE, ENVIRONMENT)
    run.append("metrics", [eval_row(0, 1, 50), train_row(1, 60, random.Random(0)), eval_row(1, 2, 50)])
    for number, text in enumerate(HOSTILE):
        bad = {"problem": f"{number}{text}", "prompt": text, "text": text, "answer": text, "stop": text}
        run.append("evals", [{"step": step, "right": number % 2 == step, **bad} for step in (0, 1)])
    run.append("samples", [row | {"prompt": HOSTILE[0], "text": HOSTILE[row["sample"] % 6]} for row in samples(1)])
    parsed = read(run)
    assert set(parsed.tags) <= set(clean.tags)
    assert {name for name, _ in parsed.attributes} <= {name for name, _ in clean.attributes}
    raw = (run.folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", raw)
    for shown in ("<script>alert(1)</script>", "{{ 7 * 7 }}", "␛[2J␛]0;title␇ ␀ <U+202E> <U+009B>31m"):
        assert parsed.text.count(shown) >= 5, shown  # prompt, answer, before, after, and among the samples


def test_hostile_names_in_the_configuration_are_text_too(tmp_path):
    name = "<script>x</script>"
    run = create(tmp_path / "run", replace(RECIPE, name=name, model=name), {"cpu": name})
    parsed = read(run)
    assert "script" not in parsed.tags
    assert parsed.text.count(name) >= 4  # title, heading, configuration, environment


def test_the_report_asks_for_nothing_from_elsewhere(tmp_path):
    html = page.write(finished_run(tmp_path / "run").folder).read_text(encoding="utf-8")
    parsed = Parsed(html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<iframe", html)
    assert not {name for name, _ in parsed.attributes} & {"src", "href", "xlink:href", "srcset", "action", "style"}


@pytest.mark.parametrize("kept", ["nothing", "config", "baseline", "one step", "no evals", "no config"])
def test_a_run_in_any_state_has_a_report(tmp_path, kept):
    run = create(tmp_path / "run", RECIPE, ENVIRONMENT)
    if kept in ("baseline", "one step"):
        run.append("metrics", [eval_row(0, 7, 50)])
        run.append("evals", answers(0, 1, 10))
    if kept in ("one step", "no evals"):
        run.append("metrics", [{"kind": "train", "step": 1, "reward": 0.5}])
    if kept in ("nothing", "no config"):
        (run.folder / "config.json").unlink()
    if kept == "nothing":
        (run.folder / "environment.json").unlink()
    text = read(run).text.replace("\u202f", " ")
    expected = {
        "nothing": "No environment.json",
        "config": "no training step yet",
        "baseline": "Held-out accuracy before training: 95 % interval 7.0 % to 26.2 %, 50 problems.",
        "one step": "not finished: 1 of 60 steps",
        "no evals": "Held-out accuracy has not been measured yet.",
        "no config": "No config.json",
    }
    assert expected[kept] in text


def test_metrics_that_are_missing_are_named_not_drawn(tmp_path):
    run = create(tmp_path / "run", RECIPE, {})
    run.append("metrics", [{"kind": "train", "step": step, "reward": 0.1 * step} for step in range(1, 4)])
    parsed = read(run)
    assert "Not recorded in this run:" in parsed.text
    assert "kl to the reference" in parsed.text
    assert parsed.tags.count("svg") == 1


def test_dropped_groups_are_counted_where_there_are_any(tmp_path):
    for number, dropped in enumerate(([0, 0], [2, 1])):
        run = create(tmp_path / str(number), RECIPE, {})
        rows = [{"kind": "train", "step": i + 1, "reward": 0.5, "groups_dropped": n} for i, n in enumerate(dropped)]
        run.append("metrics", rows)
        assert ("groups dropped, too few grades" in read(run).text) == any(dropped)
    assert "groups dropped, too few grades 3" in read(run).text or "3 groups dropped" in read(run).text


def test_problems_that_became_wrong_are_counted_and_shown(tmp_path):
    run = create(tmp_path / "run", RECIPE, {})
    run.append("evals", [*answers(0, 8, 10), *answers(60, 5, 10)])  # 5 stay right, 3 become wrong, 2 stay wrong
    parsed = read(run)
    assert "right before 5 3" in parsed.text
    assert "wrong before 0 2" in parsed.text
    assert "became wrong · answer: 37" in parsed.text  # number 5 of ten: 15 + 22
    assert parsed.text.count("became wrong ·") == 3


def test_an_unknown_grade_is_not_called_wrong(tmp_path):
    run = create(tmp_path / "run", RECIPE, {})
    run.append("samples", [samples(1)[0] | {"score": None, "right": False, "known": False, "advantage": None}])
    text = read(run).text
    assert "unknown" in text
    assert "wrong" not in text


def test_long_texts_are_cut_and_the_rest_is_counted(tmp_path):
    run = create(tmp_path / "run", RECIPE, {})
    run.append("samples", [samples(1)[0] | {"text": "y" * (page.MAX_TEXT + 123)}])
    text = read(run).text
    assert "y" * page.MAX_TEXT + " … (123 more characters)" in text


def test_a_long_run_has_a_small_report(tmp_path):
    run = create(tmp_path / "run", replace(RECIPE, num_steps=5000), {})
    noise = random.Random(1)
    run.append("metrics", [train_row(step, 5000, noise) for step in range(1, 5001)])
    assert page.write(run.folder).stat().st_size < 300_000


def test_a_report_is_replaced_whole(tmp_path, monkeypatch):
    run = finished_run(tmp_path / "run", steps=3)
    before = page.write(run.folder).read_bytes()
    monkeypatch.setattr(page, "render", lambda record: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page.write(run.folder)
    assert (run.folder / "report.html").read_bytes() == before


def test_the_headline_of_a_run_is_one_line_with_its_interval(tmp_path):
    run = finished_run(tmp_path / "run")
    said = page.headline(read_run(run.folder))
    assert said == (
        "made-up: finished: 60 steps; held-out accuracy 12.4% → 97.4% (95 % interval 95.6% to 98.5%, 500 problems)"
    )


def test_no_run_no_report(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        page.write(tmp_path)


def test_what_the_learner_measures_is_said_to_be_over_what_it_computed():
    captions = {next(iter(metrics)): caption for _, caption, metrics, _ in page.CHARTS}
    assert [name for name in captions if page.COMPUTED in captions[name]] == [
        "entropy",
        "kl_k3",
        "clip_share",
        "gap_max",
    ]


def test_every_metric_that_is_drawn_is_explained_in_the_guide():
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "report.md").read_text(encoding="utf-8")
    for _, _, metrics, _ in page.CHARTS:
        assert [name for name in metrics if f"`{name}`" not in guide] == []


def test_the_policy_allows_the_one_style_of_the_page_and_nothing_else(tmp_path):
    html = page.write(finished_run(tmp_path / "run").folder).read_text(encoding="utf-8")
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (said,) = [value for name, value in Parsed(html).attributes if name == "content" and "default-src" in value]
    assert said == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert html.index("Content-Security-Policy") < html.index("<title>")  # it holds from where it stands
    assert "style=" not in html  # which the hash does not cover


ATTRIBUTES = [
    '" onload="alert(1)',
    "' onload='alert(1)",
    "`",
    "x onmouseover=alert(1)",
    "javascript:alert(1)",
    "\u2028",
    "--><svg>",
]


@pytest.mark.parametrize(
    "text", [*HOSTILE, *ATTRIBUTES, "</style><script>", "</title><script>", "\udfff\ud800", "\x00" * 9]
)
def test_no_text_in_any_place_of_a_run_breaks_out(tmp_path, text):
    """In every value of every file, keys of the configuration included, in one page."""
    run = create(tmp_path / "run", RECIPE, {"cpu": text, text: text})
    run.append("metrics", [eval_row(0, 1, 50), train_row(1, 60, random.Random(0)) | {text: 1.0}, eval_row(1, 2, 50)])
    bad = dict.fromkeys(("problem", "prompt", "text", "answer", "stop"), text)
    run.append("evals", [{"step": step, "right": True, **bad} for step in (0, 1)])
    run.append("samples", [row | {"prompt": text, "text": text, "stop": text} for row in samples(1)])
    config = json.loads((run.folder / "config.json").read_text()) | {
        "name": text,
        text: {text: [text]},
        "task": {"name": text},
    }
    (run.folder / "config.json").write_text(json.dumps(config))
    allowed = Parsed(page.write(finished_run(tmp_path / "clean", steps=3).folder).read_text(encoding="utf-8"))
    parsed = read(run)
    assert set(parsed.tags) <= set(allowed.tags)
    assert {name for name, _ in parsed.attributes} <= {name for name, _ in allowed.attributes}
