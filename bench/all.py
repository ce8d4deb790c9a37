"""Every bench, one after another, with the same options."""

from bench import learner, memory, parted, rollout, sampling, step


def main() -> None:
    """The quick ones first."""
    for bench in (sampling, parted, rollout, learner, step, memory):
        bench.main()


if __name__ == "__main__":
    main()
