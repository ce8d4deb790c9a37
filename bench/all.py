"""Every bench, one after another, with the same options."""

import sys

import torch

from bench import gpu, learner, memory, parted, planning, rollout, sampling, step


def main() -> None:
    """The quick ones first."""
    for bench in (planning, sampling, parted, rollout, learner, step, memory):
        bench.main()
    if torch.cuda.is_available() or "--quick" in sys.argv:
        gpu.main()
    else:
        print("\ngpu: left out, PyTorch sees no CUDA device here")


if __name__ == "__main__":
    main()
