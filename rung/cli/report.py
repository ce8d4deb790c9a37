"""`rung report RUN`"""

from dataclasses import dataclass

from rung.cli import options
from rung.report import page
from rung.report.load import find_run

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
    print(page.write(find_run(options.read(Report, args, command=COMMAND).run)))
