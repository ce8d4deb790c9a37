"""`rung runs`"""

from dataclasses import dataclass
from pathlib import Path

from rung.cli import options
from rung.core.errors import RunError
from rung.core.rundir import RunDir
from rung.report.load import RUNS, Record, read_run
from rung.report.visible import one_line

COMMAND = "rung runs"


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the runs in a folder: how far they are, and the held-out accuracy at their start and now.

    folder: where to look
    """

    folder: str = RUNS


def help(args: list[str]) -> str:
    return options.help_of(Runs, COMMAND)


def run(args: list[str]) -> None:
    folder = Path(options.read(Runs, args, command=COMMAND).folder)
    found = sorted(path.parent for path in folder.glob("*/VERSION"))
    rows = [("run", "state", "steps", "held-out accuracy", "model"), *(_row(path) for path in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    if not found:
        print(f"No runs in {one_line(str(folder))}/. Start one: rung train arithmetic")
    else:
        print(
            "\n".join(
                "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
            )
        )


def _row(folder: Path) -> tuple[str, str, str, str, str]:
    try:
        record = read_run(folder)
    except RunError:
        return one_line(folder.name), "another version of Rung", "", "", ""
    measured = record.accuracies
    accuracy = " → ".join(f"{found.value:.1%}" for found in dict.fromkeys([*measured[:1], *measured[-1:]]))
    return (
        one_line(folder.name),
        _state(record),
        f"{len(record.train)}/{record.num_steps}",
        accuracy,
        one_line(str(record.config.get("model", ""))),
    )


def _state(record: Record) -> str:
    if RunDir(record.folder).owner() is not None:
        return "running"
    return "finished" if record.finished else "stopped"
