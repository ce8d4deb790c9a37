"""Wall time of a whole GRPO step with full fine-tuning, against `trl`: generate, grade, loss, optimiser."""

from bench import workload
from bench.harness import Options, Side, announce, compare, options, seconds

DTYPES = ("bf16", "pure-bf16", "fp32")


def main() -> None:
    """Short answers by many prompts, then long answers."""
    given = options(__doc__, parts=("short", "long"))
    announce(given)
    short = workload.step(2, 2, 4, 2) if given.quick else workload.step(16, 8, 16, 32)
    long = workload.step(2, 2, 8, 2) if given.quick else workload.step(8, 8, 256, 16)
    if given.wants("short"):
        against_trl(short, ">= 8", given)
    if given.wants("long"):
        against_trl(long, ">= 4", given)


def against_trl(size: dict, bar: str, given: Options) -> None:
    """One size of step, lengths forced on both sides, equal micro-batches."""
    common = {"model": given.model, **size}
    ours = Side(name="rung", job="bench.ours:step", spec={**common, "dtype": "auto"})
    peers = [Side(name=f"trl, {d}", job="bench.peers:step", spec={**common, "dtype": d}) for d in DTYPES]
    what = "whole step: {num_prompts} prompts x {samples} samples x {max_tokens} tokens".format(**size)
    compare(what, ours, peers, seconds, unit="s", bar=bar, given=given, higher_is_better=False)


if __name__ == "__main__":
    main()
