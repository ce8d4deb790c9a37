"""The report of a run: one HTML file without script and without network, made from the run folder alone.

`page.html` is the template, `page.css` its style.  Every text that it inserts is escaped by Jinja and has its control
characters made visible, so that nothing a model wrote can become part of the page.  Should something slip through all
the same, the page's own policy lets a browser load and run nothing but that style, known by its hash.
"""

import base64
import hashlib
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rung import __version__
from rung.core.rundir import write_atomic
from rung.report.curves import Curve, bars, chart, number, window_of
from rung.report.load import Accuracy, Pair, Record, Row, flat, read_run
from rung.report.visible import visible

MAX_TEXT = 2000  # characters of a model's text that are shown
PAIRS_OF_A_KIND = {"became right": 6, "still wrong": 4, "became wrong": 4, "still right": 2}  # shown, at most
EVAL_FLAGS = {
    "max_tokens": "--max-tokens",
    "max_turns": "--max-turns",
    "max_length": "--max-length",
    "eval_problems": "--problems",
    "dtype": "--dtype",
    "device": "--device",
}
MAX_GROUP = 8  # samples of the group that is shown
PHASES = {"prefill": "prompts (prefill)", "decode": "sampling (decode)", "grade": "grading", "learn": "learning"}
COMPUTED = "over the tokens that the learner computed; it skips groups that can teach it nothing."

# title, caption, {metric: (name, how it is drawn)}, how the axis is drawn
CHARTS: Sequence[tuple[str, str, Mapping[str, tuple[str, dict[str, Any]]], dict[str, Any]]] = (
    ("Reward", "Mean reward of the sampled answers of each step.", {"reward": ("reward", {"smooth": True})}, {}),
    (
        "Right answers while sampling",
        "Share of sampled answers that count as correct, on training problems and at the training temperature.",
        {"right": ("right", {"smooth": True})},
        {"share": True},
    ),
    ("Length", "Tokens sampled in an episode, end tokens included.", {"length": ("length", {"smooth": True})}, {}),
    (
        "Ended by itself",
        "Share of sampled answers that ended with the end token instead of being cut off.",
        {"ended": ("ended", {"smooth": True})},
        {"share": True},
    ),
    (
        "Entropy",
        f"Mean entropy of the next-token distribution, in nats, {COMPUTED}",
        {"entropy": ("entropy", {"smooth": True})},
        {},
    ),
    (
        "KL to the reference",
        f"Distance from the starting model by the k3 estimator, in nats: mean {COMPUTED}",
        {"kl_k3": ("KL (k3)", {"smooth": True})},
        {},
    ),
    (
        "Clipped",
        f"Share of tokens whose ratio lay outside the clip, so that they gave no gradient, {COMPUTED} "
        "Zero with one update a step.",
        {"clip_share": ("clipped", {"smooth": True})},
        {"share": True},
    ),
    (
        "Groups without signal",
        "Share of groups whose samples all got the same reward: nothing to compare, nothing learnt from them.",
        {"no_signal": ("no signal", {"smooth": True})},
        {"share": True},
    ),
    (
        "Log-probability gap",
        "Absolute difference between the sampler's and the learner's log-probability of the same token, in nats, "
        f"{COMPUTED} "
        "It should be rounding error; a jump means that the two are not the same model.",
        {"gap_max": ("largest", {"style": "second", "worst": True}), "gap_mean": ("mean", {})},
        {"log": True},
    ),
    ("Gradient norm", "Before clipping.", {"grad_norm": ("norm", {"smooth": True})}, {}),
    (
        "Loss",
        "The surrogate's value. It need not fall while the reward rises.",
        {"loss": ("loss", {"smooth": True})},
        {},
    ),
    ("Learning rate", "", {"lr": ("learning rate", {})}, {}),
)


def write(run_folder: str | Path) -> Path:
    """Write `report.html` into a run folder, whatever state the run is in.  Raises RunError where there is no run."""
    record = read_run(run_folder)
    path = record.folder / "report.html"
    write_atomic(path, render(record).encode("utf-8"))
    return path


def render(record: Record) -> str:
    """The page of a run as HTML."""
    import jinja2
    from markupsafe import Markup

    surroundings = jinja2.Environment(autoescape=True, finalize=_finalize, undefined=jinja2.StrictUndefined)
    template = surroundings.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return template.render(_view(record), style=Markup(style), policy=policy(style))


def policy(style: str) -> str:
    """The Content-Security-Policy of a page with this one style: no script, no image, no font, no form, no frame."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def headline(record: Record) -> str:
    """What came out of a run, in one line."""
    if not record.accuracies:
        return f"{record.name}: {_state(record)}; held-out accuracy has not been measured"
    first, last = record.accuracies[0], record.accuracies[-1]
    before = f"{first.value:.1%} → " if last.step > first.step else ""
    interval = f"95 % interval {last.low:.1%} to {last.high:.1%}, {last.n} problems"
    return f"{record.name}: {_state(record)}; held-out accuracy {before}{last.value:.1%} ({interval})"


def _finalize(value: Any) -> Any:
    from markupsafe import Markup

    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _view(record: Record) -> dict[str, Any]:
    """What the template shows, as plain values."""
    first, last = (record.accuracies[0], record.accuracies[-1]) if record.accuracies else (None, None)
    charts, absent = _charts(record)
    return {
        "name": record.name,
        "subtitle": _subtitle(record.config),
        "finished": record.finished,
        "state": _state(record),
        "notes": record.notes,
        "before": _percent(first.value) if first and last and last.step > first.step else "",
        "after": _percent(last.value) if last else "",
        "headline": _headline(first, last),
        "tiles": _tiles(record),
        "charts": charts,
        "absent": ", ".join(absent),
        "smoothing": _smoothing(record),
        "time": _time(record),
        "flow": Counter(pair.kind for pair in record.pairs),
        "pairs": [_shown_pair(pair) for pair in _chosen(record.pairs)],
        "choice": "Shown are the first problems of each kind in the order they were asked, not a choice by hand.",
        "group": _group(record.group),
        "commands": _commands(record),
        "config": [(key, value) for key, value in flat(record.config) if key != "schema"],
        "environment": list(flat(record.environment)),
        "footer": f"Written by Rung {__version__} from {record.folder.resolve().name}/. "
        "Intervals are 95 % Wilson score intervals over the problems; they do not cover other seeds.",
    }


def _subtitle(config: Row) -> str:
    task = config.get("task")
    parts = {
        "model": config.get("model"),
        "task": task.get("name") if isinstance(task, Mapping) else task,
        "seed": config.get("seed"),
    }
    return " · ".join(f"{name} {value}" for name, value in parts.items() if value is not None)


def _state(record: Record) -> str:
    done = len(record.train)
    if record.finished:
        return f"finished: {done} steps"
    if not done:
        return "no training step yet"
    return f"not finished: {done} of {record.num_steps or 'unknown'} steps"


def _headline(first: Accuracy | None, last: Accuracy | None) -> str:
    """What the big number is, in one or two sentences."""
    if first is None or last is None:
        return "Held-out accuracy has not been measured yet."

    def interval(accuracy: Accuracy) -> str:
        return f"95 % interval {_percent(accuracy.low)} to {_percent(accuracy.high)}"

    if first.step == last.step:
        when = "before training" if last.step == 0 else f"after step {last.step}"
        return f"Held-out accuracy {when}: {interval(last)}, {last.n} problems."
    return (
        f"Held-out accuracy before training ({interval(first)}) and after {last.step} steps ({interval(last)}), "
        f"on {last.n} problems that were never trained on."
    )


def _tiles(record: Record) -> list[tuple[str, str]]:
    """The run in a few numbers; those that are not known are left out."""
    tiles = [("steps", f"{len(record.train)}" + (f" / {record.num_steps}" if record.num_steps else ""))]
    if rewards := record.points("reward"):
        tiles.append(("reward, first → last step", f"{rewards[0][1]:.2f} → {rewards[-1][1]:.2f}"))
    tokens, sampling = record.total("tokens"), record.total("seconds_prefill") + record.total("seconds_decode")
    if tokens:
        tiles.append(("tokens sampled", f"{tokens:,.0f}"))
    if tokens and sampling:
        tiles.append(("tokens/s while sampling", f"{tokens / sampling:,.0f}"))
    if seconds := record.total("seconds"):
        tiles.append(("time in steps", _duration(seconds)))
    if gaps := record.points("gap_max"):
        tiles.append(("largest log-prob gap", f"{max(gap for _, gap in gaps):.2g} nats"))
    if turns := [turns for _, turns in record.points("turns") if turns > 1]:
        tiles.append(("answers an episode", f"{sum(turns) / len(turns):.1f}"))
    if unknown := record.total("unknown"):
        tiles.append(("grades unknown", _percent(unknown / len(record.train))))
    if dropped := record.total("groups_dropped"):
        tiles.append(("groups dropped, too few grades", f"{dropped:,.0f}"))
    return tiles


def _charts(record: Record) -> tuple[list[dict[str, Any]], list[str]]:
    """The charts that can be drawn, and the titles of those whose metrics the run does not have."""
    from markupsafe import Markup

    drawn, absent = [], []
    steps = [*(row["step"] for row in record.train), *(a.step for a in (*record.accuracies, *record.validation))]
    span = (min(steps), max(steps)) if steps else None
    if measured := [part for part in (record.accuracies, record.validation) if part]:
        curves = [_accuracy_curve(part, held_out=part is record.accuracies) for part in measured]
        caption = (
            "Greedy answers to problems that are never trained on. Whiskers: 95 % Wilson score interval over "
            + " and ".join(f"{part[-1].n} {curve.name}" for part, curve in zip(measured, curves, strict=True))
            + " problems."
        )
        drawing, legend = Markup(chart(curves, share=True, span=span)), [(curve.style, curve.name) for curve in curves]
        drawn.append({"title": "Accuracy", "svg": drawing, "caption": caption, "legend": legend})
    for title, caption, metrics, axis in CHARTS:
        curves = [Curve(name=name, points=record.points(metric), **style) for metric, (name, style) in metrics.items()]
        svg = chart(curves, span=span, **axis)
        if svg:
            keys = [(curve.style, curve.name) for curve in curves if curve.points]
            drawn.append({"title": title, "svg": Markup(svg), "caption": caption, "legend": keys})
        elif not any(curve.points for curve in curves):
            absent.append(title.lower())
    return drawn, absent if drawn else []


def _accuracy_curve(measured: Sequence[Accuracy], *, held_out: bool) -> Curve:
    return Curve(
        name="held-out" if held_out else "validation",
        points=[(accuracy.step, accuracy.value) for accuracy in measured],
        low=[accuracy.low for accuracy in measured],
        high=[accuracy.high for accuracy in measured],
        style="line" if held_out else "second",
        joined=len(measured) > 2,
    )


def _smoothing(record: Record) -> str:
    window = window_of(record.points("reward") or record.points("seconds"))
    return (
        f"Horizontal axis: step. Faint: each step. Strong: mean over {window} steps."
        if window > 1
        else "Horizontal axis: step."
    )


def _time(record: Record) -> dict[str, Any] | None:
    """Seconds by phase; what no phase accounts for is called other."""
    from markupsafe import Markup

    parts = [(name, record.total(f"seconds_{phase}")) for phase, name in PHASES.items()]
    parts = [(name, seconds) for name, seconds in parts if seconds > 0]
    whole = record.total("seconds")
    known = sum(seconds for _, seconds in parts)
    if whole > known:
        parts.append(("other", whole - known))
    total = sum(seconds for _, seconds in parts)
    if total <= 0:
        return None
    steps = max(len(record.train), 1)
    rows = [
        {
            "name": name,
            "total": _duration(seconds),
            "step": f"{seconds / steps:.2f} s",
            "share": _percent(seconds / total),
        }
        for name, seconds in parts
    ]
    note = f"{_duration(total)} in {steps} {'step' if steps == 1 else 'steps'}. Checkpoints are not in it"
    note += f", nor are evaluations, which took {_duration(record.seconds_evaluating)}."
    return {"svg": Markup(bars(parts)), "rows": rows, "note": note}


def _chosen(pairs: Sequence[Pair]) -> list[Pair]:
    """The first few problems of every kind, in the order they were asked."""
    chosen: list[Pair] = []
    for kind, most in PAIRS_OF_A_KIND.items():
        chosen += [pair for pair in pairs if pair.kind == kind][:most]
    return chosen


def _shown_pair(pair: Pair) -> dict[str, Any]:
    return {
        "prompt": _cut(pair.prompt),
        "answer": pair.answer,
        "kind": pair.kind,
        "sides": [_side(pair.before, "before"), _side(pair.after, "after")],
    }


def _side(row: Row, when: str = "") -> dict[str, str]:
    """One answer: its text and what was thought of it."""
    mark = "unknown" if row.get("known") is False else "right" if row.get("right") else "wrong"
    verdict = [mark] + (["cut off"] if row.get("stop") == "length" else [])
    for name in ("score", "advantage"):
        if isinstance(row.get(name), int | float):
            verdict.append(f"{name} {number(row[name])}")
    return {"when": when, "mark": mark, "verdict": ", ".join(verdict), "text": _cut(str(row.get("text", "")))}


def _group(rows: Sequence[Row]) -> dict[str, Any] | None:
    if not rows:
        return None
    shown = f"{min(len(rows), MAX_GROUP)} of {len(rows)} samples"
    note = f"Step {rows[0].get('step')}, the problem that was written last; {shown}."
    return {
        "note": note,
        "prompt": _cut(str(rows[0].get("prompt", ""))),
        "sides": [_side(row) for row in rows[:MAX_GROUP]],
    }


def _commands(record: Record) -> str:
    """What to type to measure the model, and for the same run again."""
    lines = []
    task = record.config.get("task")
    if (record.folder / "model").is_dir() and isinstance(task, Mapping):
        model = str(record.folder / "model")
        lines.append(["rung", "eval", model, str(task.get("name"))])
        lines[-1] += [f"{flag}={record.config[name]}" for name, flag in EVAL_FLAGS.items() if name in record.config]
        lines[-1] += ["--foreign"] * bool(record.config.get("foreign"))
        for part, values in (("grading", record.config.get("grading")), ("task.options", task.get("options"))):
            lines[-1] += [_option(part, *item) for item in (values.items() if isinstance(values, Mapping) else ())]
    lines.append(["rung", "train", str(record.folder / "config.json"), "--name", f"{record.name}-again"])
    return "\n".join(map(shlex.join, lines))


def _option(part: str, name: str, value: Any) -> str:
    """One value of a part of the run as `rung eval` reads it."""
    word = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{part}.{word if value else 'no-' + word}"
    return f"--{part}.{word}={value}"


def _cut(text: str) -> str:
    more = len(text) - MAX_TEXT
    return text if more <= 0 else f"{text[:MAX_TEXT]} … ({more} more characters)"


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", "\u202f%")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"
