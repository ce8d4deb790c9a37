"""`rung resume RUN`"""

from dataclasses import dataclass

from rung.cli import jobs, options
from rung.report.load import find_run

COMMAND = "rung resume"


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a run from its newest checkpoint, bit for bit as if it had never stopped.

    run: a run's folder, or its name under runs/
    allow_changed: go on although machine, threads or versions differ from those the run was started with
    tensorboard: mirror the metrics to FOLDER/tensorboard
    """

    run: str
    allow_changed: bool = False
    tensorboard: bool = False


def help(args: list[str]) -> str:
    return options.help_of(Resume, COMMAND)


def run(args: list[str]) -> None:
    asked = options.read(Resume, args, command=COMMAND)
    import rung

    folder = find_run(asked.run)
    jobs.follow(
        folder,
        lambda listener: rung.resume(folder, listener=listener, allow_changed=asked.allow_changed),
        tensorboard=asked.tensorboard,
    )
