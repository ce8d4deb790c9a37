"""`rung VERB ...`: every verb is one file here, and one call of a public function of `rung`.

stdout is for the answer, stderr for everything else.  Exit codes: 0 done, 1 it failed, 2 the command was not
understood, 130 stopped by Ctrl-C.  Errors meant for a person are one line; RUNG_TRACEBACK=1 shows where they came from.
"""

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from rung import __version__
from rung.core.errors import ConfigError, RungError
from rung.report.visible import visible

# verb -> what it does; the file is rung/cli/VERB.py, with `help(args)` and `run(args)`
VERBS: Mapping[str, str] = {
    "train": "teach a model a task by reinforcement learning",
    "resume": "go on with a run that was stopped",
    "eval": "measure how many problems of a task a model solves",
    "generate": "continue a prompt; the text alone goes to stdout",
    "chat": "talk with a model",
    "runs": "list the runs on this machine",
    "report": "write the report of a run",
    "diff": "compare two runs, and say whether they differ by more than chance",
    "models": "list the models on this machine, and how to get others",
    "solve": "solve a finite Markov decision process exactly",
    "figures": "compute the textbooks' figures anew",
}
FAILED, MISUNDERSTOOD, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal that knows few letters
    try:
        _run(args)
        sys.stdout.flush()
        return 0
    except RungError as error:
        if os.environ.get("RUNG_TRACEBACK"):
            raise
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return MISUNDERSTOOD if isinstance(error, ConfigError) else FAILED
    except KeyboardInterrupt:
        if os.environ.get("RUNG_TRACEBACK"):
            raise
        print("Stopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read stdout has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def overview() -> str:
    """What `rung --help` prints."""
    lines = ["usage: rung VERB ...", "", "Reinforcement learning, rung by rung.", "", "verbs:"]
    lines += [f"  {verb:<10} {said}" for verb, said in VERBS.items()]
    lines += [
        "",
        "`rung VERB --help` says more.  First: rung train arithmetic",
        "RUNG_TRACEBACK=1 shows where an error came from.",
    ]
    return "\n".join(lines)


def _run(args: list[str]) -> None:
    if not args or args[0] in ("--help", "-h", "help"):
        print(overview())
    elif args[0] == "--version":
        print(f"rung {__version__}")
    elif args[0] not in VERBS:
        close = difflib.get_close_matches(args[0], VERBS, n=1, cutoff=0.5)
        hint = f"Did you mean `rung {close[0]}`?" if close else f"Known: {', '.join(VERBS)}."
        raise ConfigError(f"rung has no verb {args[0]!r}. {hint}")
    else:
        verb = import_module(f"rung.cli.{args[0]}")
        asked = [word for word in args[1:] if word in ("--help", "-h", "--")]
        if asked and asked[0] != "--":
            print(verb.help(args[1:]))
        else:
            verb.run(args[1:])


if __name__ == "__main__":
    sys.exit(main())
