"""Peak resident memory of a whole GRPO step (16 x 8 x 16), against `trl` at equal micro-batch, in fresh processes.

Once with all weights learning, once with a LoRA adapter on all linear layers on both sides (trl's is PEFT's).
"""

from bench import workload
from bench.harness import Options, Side, SideFailedError, Worker, announce, options, record

DTYPES = ("bf16", "pure-bf16", "fp32")
LORA = {"rank": 16, "alpha": 32.0}
STEPS = 2  # the optimiser's state is there from the second step on


def main() -> None:
    """With micro-batches of 32 and of all 128 sequences."""
    given = options(__doc__, parts=("weights", "lora"))
    announce(given)
    for part, lora in (("weights", None), ("lora", LORA)):
        for size in (32, 128):
            if given.wants(part):
                against_trl(workload.step(2, 2, 4, 2) if given.quick else workload.step(16, 8, 16, size), lora, given)


def against_trl(size: dict, lora: dict | None, given: Options) -> None:
    """Everything counts: interpreter, libraries, weights, optimiser, activations."""
    what = "peak memory: {num_prompts} x {samples} x {max_tokens} tokens, micro-batch {micro_batch}".format(**size)
    what += f", LoRA of rank {lora['rank']}" if lora else ""
    print(f"\n{what}", flush=True)
    common = {"model": given.model, **size, "lora": lora}
    ours = Side(name="rung", job="bench.ours:step", spec={**common, "dtype": "auto"})
    peers = [Side(name=f"trl, {d}", job="bench.peers:step", spec={**common, "dtype": d}) for d in DTYPES]
    peaks: dict[str, float] = {}
    for side in (ours, *peers):
        try:
            peaks[side.name] = peak = _peak(side, given.threads)
        except SideFailedError as failure:
            print(f"  {side.name} did not finish (not enough memory?): {failure}", flush=True)
            continue
        print(f"  {side.name:<20} {peak / 1e9:6.2f} GB   (ours is {peaks[ours.name] / peak:.2f} of it)", flush=True)
    record({"what": what, "unit": "bytes", "bar": "<= 1/2 of trl's", "peaks": peaks, "quick": given.quick})


def _peak(side: Side, threads: int) -> float:
    with Worker(side, threads) as worker:
        return max(worker.turn(number)["peak_bytes"] for number in range(STEPS))


if __name__ == "__main__":
    main()
