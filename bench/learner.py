"""Wall time of loss and backward pass on one batch of uneven lengths, against `trl`'s GRPOTrainer."""

import statistics

from bench import workload
from bench.harness import Side, announce, compare, options, seconds

DTYPES = ("bf16", "pure-bf16", "fp32")


def main() -> None:
    """4 prompts x 8 completions of 16 to 128 tokens; gradient norms are printed, since both must do the same work."""
    given = options(__doc__)
    announce(given)
    batch = workload.uneven(1, 2, (8, 16), (4, 8)) if given.quick else workload.uneven(4, 8, (20, 120), (16, 128))
    sequences = batch["groups"] * batch["samples"]
    common = {"model": given.model, "batch": batch, "micro_batch": sequences}
    ours = Side(name="rung", job="bench.ours:learner", spec={**common, "dtype": "auto"})
    peers = [Side(name=f"trl, {d}", job="bench.peers:learner", spec={**common, "dtype": d}) for d in DTYPES]
    what = f"learner: {sequences} sequences, prompts {batch['prompt']}, completions {batch['completion']} tokens"
    result = compare(what, ours, peers, seconds, unit="s", bar=">= 2", given=given, higher_is_better=False)
    norms = {name: statistics.median(t["grad_norm"] for t in turns) for name, turns in result["turns"].items()}
    print("  norm of the gradient: " + ", ".join(f"{name} {norm:.4g}" for name, norm in norms.items()))


if __name__ == "__main__":
    main()
