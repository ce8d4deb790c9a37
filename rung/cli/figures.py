"""`rung figures`"""

import sys
from dataclasses import dataclass
from pathlib import Path

from rung.cli import options
from rung.core.errors import RungError
from rung.report.visible import one_line

COMMAND = "rung figures"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Compute the textbooks' figures anew, compare every number that they print, and write one page.

    folder: where the page and the pictures go
    only: a part of the names of the figures that are wanted, such as zhao or sb_6
    """

    folder: str = "figures"
    only: str = ""


def help(args: list[str]) -> str:
    return options.help_of(Figures, COMMAND)


def run(args: list[str]) -> None:
    asked = options.read(Figures, args, command=COMMAND)
    from rung.cli.display import Display
    from rung.mdp.figures import page

    with Display() as display:
        path, failed = page.write(Path(asked.folder), display, only=asked.only)
    print(one_line(str(path)) if sys.stdout.isatty() else path)
    if failed:
        raise RungError(f"these do not hold: {'; '.join(failed)}")
