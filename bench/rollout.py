"""Rollout tokens per second against `transformers` generate: a batch of groups, ragged streams, and one stream."""

import statistics

from bench import workload
from bench.harness import Options, Side, announce, compare, measure, options, tokens_per_second

VOCABULARY = 49152


def main() -> None:
    """Three comparisons, and what one stream could reach at most."""
    parts = {"groups": groups, "ragged": ragged, "one": one}
    given = options(__doc__, parts=tuple(parts))
    announce(given)
    for name, part in parts.items():
        if given.wants(name):
            part(given)


def groups(given: Options) -> None:
    """8 prompts x 8 samples x 64 tokens."""
    prompts, samples, tokens = (2, 2, 4) if given.quick else (8, 8, 64)
    spec = {
        "prompts": workload.prompts(prompts, 24, 56, vocabulary=VOCABULARY),
        "samples": samples,
        "lengths": [tokens] * (prompts * samples),
        "slots": 64,
    }
    _against_generate(f"rollout: {prompts} prompts x {samples} samples x {tokens} tokens", spec, ">= 5", given)


def ragged(given: Options) -> None:
    """64 streams whose lengths, 16 to 512, are forced by seed; prompts of 20 to 300 tokens."""
    streams, low, high = (4, 2, 8) if given.quick else (64, 16, 512)
    spec = {
        "prompts": workload.prompts(streams, 20, 300, vocabulary=VOCABULARY),
        "samples": 1,
        "lengths": workload.lengths(streams, low, high),
        "slots": 64,
    }
    _against_generate(f"rollout: {streams} streams of {low} to {high} tokens, prompts 20 to 300", spec, ">= 6", given)


def one(given: Options) -> None:
    """One stream, and its share of the floor: weight bytes over the bandwidth of streaming the same tensors."""
    tokens = 8 if given.quick else 128
    spec = {
        "prompts": workload.prompts(1, 40, 40, vocabulary=VOCABULARY),
        "samples": 1,
        "lengths": [tokens],
        "slots": 1,
    }
    result = _against_generate(f"rollout: one stream of {tokens} tokens", spec, ">= 2", given)
    side = Side(name="stream the weights", job="bench.ours:floor", spec={"model": given.model, "dtype": "bf16"})
    what = "floor of one stream: reading every weight once"
    floor = measure(what, side, lambda turn: turn["seconds"], unit="s a token", bar="-", given=given)
    step = statistics.median(turn["decode"] / max(turn["steps"], 1) for turn in result["turns"][result["ours"]])
    size = floor["turns"][0]["bytes"]
    print(
        f"  {size / 1e6:.0f} MB of weights at {size / floor['median'] / 1e9:.1f} GB/s; a decoding step takes "
        f"{step * 1e3:.2f} ms: {floor['median'] / step:.0%} of the floor"
    )


def _against_generate(what: str, spec: dict, bar: str, given: Options) -> dict:
    common = {**spec, "model": given.model, "dtype": "bf16"}
    ours = Side(name="rung", job="bench.ours:rollout", spec=common)
    peer = Side(name="transformers generate, bf16", job="bench.peers:rollout", spec=common)
    return compare(what, ours, [peer], tokens_per_second, unit="tokens/s", bar=bar, given=given)


if __name__ == "__main__":
    main()
