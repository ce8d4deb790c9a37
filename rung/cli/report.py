"""`rung report RUN`"""

import sys
from dataclasses import dataclass

from rung.cli import options
from rung.report import page
from rung.report.load import find_run
from rung.report.visible import one_line

COMMAND = "rung report"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html into a run's folder, finished or not, and print where it lies.

    run: a run's folder, or its name under runs/
    """

    run: str


def help(args: list[str]) -> str:
    return options.help_of(Report, COMMAND)


def run(args: list[str]) -> None:
    path = str(page.write(find_run(options.read(Report, args, command=COMMAND).run)))
    print(one_line(path) if sys.stdout.isatty() else path)
