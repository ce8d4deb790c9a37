"""`rung diff RUN RUN`"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rung.cli import options
from rung.core.errors import ConfigError
from rung.report.compare import Comparison, Difference, Solved, compare
from rung.report.load import Record, find_run, read_run
from rung.report.visible import one_line

COMMAND = "rung diff"
SHOWN = 5  # problems of a kind that the text shows; --json has all
WIDTH = 100  # characters of a model's text or of a value that a line shows


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Compare two runs: settings, machines, accuracies and what is chance in them, curves, and what one alone solved.

    first: a run's folder, or its name under runs/
    second: another
    json: print everything as one JSON object
    """

    first: str
    second: str
    json: bool = False


def help(args: list[str]) -> str:
    return options.help_of(Diff, COMMAND)


def run(args: list[str]) -> None:
    asked = options.read(Diff, args, command=COMMAND)
    folders = [find_run(name) for name in (asked.first, asked.second)]
    if folders[0].resolve() == folders[1].resolve():
        raise ConfigError(f"{COMMAND} needs two runs, and {one_line(str(folders[0]))} came twice.")
    records = [read_run(folder) for folder in folders]
    found = compare(*records)
    print(json.dumps(as_json(records, found), indent=2) if asked.json else "\n".join(as_text(records, found)))


def as_json(records: list[Record], found: Comparison) -> dict[str, Any]:
    """The comparison as plain values, with both runs' own numbers."""
    runs = [
        {
            "name": record.name,
            "folder": str(record.folder),
            "steps": len(record.train),
            "num_steps": record.num_steps,
            "finished": record.finished,
            "held_out": [asdict(accuracy) for accuracy in record.accuracies],
        }
        for record in records
    ]
    return {"runs": runs, **asdict(found)}


def as_text(records: list[Record], found: Comparison) -> list[str]:
    """What a person reads, line by line."""
    lines = [f"{side}: {_run_line(record)}" for side, record in zip(("first", "second"), records, strict=True)]
    lines += ["", "configuration", *_values(found.config)]
    lines += ["", "environment", *_values(found.environment)]
    lines += ["", "held-out accuracy"]
    for when, difference, at in (("before", found.before, 0), ("after", found.after, -1)):
        lines += _accuracy(when, difference, records, at)
    lines += ["", "curves: mean of the first tenth of the steps → of the last"]
    lines += _table([(name, *map(_curve, both)) for name, both in found.curves.items()])
    for by, name in (("first", "only the first solved"), ("second", "only the second solved")):
        lines += _solved([one for one in found.solved if one.by == by], name)
    return lines


def _run_line(record: Record) -> str:
    state = "finished" if record.finished else "not finished"
    line = f"{one_line(str(record.folder))}  {state}, {len(record.train)}/{record.num_steps} steps"
    return line if record.finished else f"{line} (to go on: rung resume {one_line(str(record.folder))})"


def _values(changed: Mapping[str, tuple[Any, Any]]) -> list[str]:
    rows = [
        (path, *(one_line(json.dumps(v, ensure_ascii=False), width=WIDTH) for v in both))
        for path, both in changed.items()
    ]
    return _table([(one_line(path), *both) for path, *both in rows]) if rows else ["  no difference"]


def _accuracy(when: str, difference: Difference | None, records: list[Record], at: int) -> list[str]:
    """Both accuracies with their intervals, and what their difference is worth."""
    shown = []
    for record in records:
        measured = record.accuracies[at : at + 1 or None]
        usable = measured and (at == 0 or record.finished)
        shown.append(
            f"{measured[0].value:.1%} ({measured[0].low:.1%} to {measured[0].high:.1%}, n {measured[0].n})"
            if usable
            else "not measured"
        )
    lines = _table([(when, *shown)])
    if difference is None:
        return lines
    verdict = "more than chance" if difference.more_than_chance else "not more than chance"
    d, low, high = (f"{100 * share:+.1f}" for share in (difference.value, difference.low, difference.high))
    lines += [f"    second less first: {d} points (95 % interval {low} to {high}), {verdict}"]
    if difference.p is None:
        return [*lines, "    no problem that both answered is on record: taken as two independent samples"]
    split = f"{difference.only_first} solved by the first alone, {difference.only_second} by the second"
    return [
        *lines,
        f"    of {difference.n} problems that both answered, {split}: p = {difference.p:.3g} (exact McNemar test)",
    ]


def _curve(summary: tuple[float, float] | None) -> str:
    return "not recorded" if summary is None else f"{summary[0]:.3g} → {summary[1]:.3g}"


def _solved(problems: list[Solved], name: str) -> list[str]:
    if not problems:
        return []
    more = f", of which {SHOWN} are shown" if len(problems) > SHOWN else ""
    lines = ["", f"{name}: {len(problems)} {'problem' if len(problems) == 1 else 'problems'}{more}"]
    for one in problems[:SHOWN]:
        lines.append(f"  {one_line(one.prompt, width=WIDTH)}  (answer: {one_line(one.answer, width=WIDTH)})")
        lines += [
            f"    {side}: {one_line(text, width=WIDTH)}"
            for side, text in zip(("first", "second"), one.texts, strict=True)
        ]
    return lines


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
