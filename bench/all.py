"""Every bench, one after another, with the same options."""

from bench import learner, memory, parted, planning, rollout, sampling, step


def main() -> None:
    """The quick ones first."""
    for bench in (planning, sampling, parted, rollout, learner, step, memory):
        bench.main()


if __name__ == "__main__":
    main()
