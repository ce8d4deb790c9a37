"""One side of a comparison in a process of its own: takes turn numbers on stdin, answers with JSON lines on stdout.

    python -m bench.worker bench.peers:rollout '{"model": "...", ...}'

A job is a function that sets everything up from a specification and returns what one turn does.  Whatever libraries
print goes to stderr, so that stdout holds answers only.
"""

import importlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Set up, say so, then serve turns until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module, _, name = sys.argv[1].partition(":")
    specification = json.loads(sys.argv[2])
    import torch

    torch.set_num_threads(specification["threads"])
    turn = getattr(importlib.import_module(module), name)(specification)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps({**turn(int(line)), "peak_bytes": peak_bytes()}), file=answers)


def peak_bytes() -> int:
    """Largest resident memory of this process so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    main()
