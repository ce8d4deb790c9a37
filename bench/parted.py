"""How often a batch parts from smaller ones: the same keys drawn with 64, 8 and 1 samples side by side.

Tokens may differ only through the rounding of products of another shape.  Printed: tokens compared, samples that parted
(each is compared up to there), the gaps of the tokens where they did, and how far log-probabilities were apart before.
"""

import torch

from bench import workload
from bench.harness import announce, options, record
from rung.core.records import GroupRequest, Sampling
from rung.engine.engine import Engine
from rung.lm.decoder import Decoder
from rung.model.model import load

Told = dict[int, list[tuple[int, float, float]]]  # key -> token, logp_raw and gap of every token


def main() -> None:
    """bf16 and fp32, against 64 slots."""
    given = options(__doc__)
    announce(given)
    for dtype in ("bf16", "fp32"):
        model = load(given.model, dtype=dtype)
        prompts, tokens = (2, 4) if given.quick else (8, 48 if dtype == "bf16" else 12)
        asked = [
            GroupRequest(
                prompt_ids=tuple(ids),
                keys=tuple(8 * number + sample for sample in range(8)),
                sampling=Sampling(max_tokens=tokens),
            )
            for number, ids in enumerate(workload.prompts(prompts, 20, 40, vocabulary=49152))
        ]
        together = told(model.decoder, asked, 64)
        for slots in (8, 1):
            compare(f"{dtype}, 64 slots and {slots}", together, told(model.decoder, asked, slots))


def told(decoder: Decoder, asked: list[GroupRequest], slots: int) -> Told:
    """Every token of every sample."""
    found: Told = {}
    for event in Engine(decoder, slots=slots).stream(asked):
        key = asked[event.request].keys[event.sample]
        found.setdefault(key, []).append((event.token, event.logp_raw, event.gap))
    return found


def compare(what: str, one: Told, other: Told) -> None:
    """Prints and records a line."""
    compared, gaps, apart = 0, [], [0.0]
    for key, stream in one.items():
        for (token, logp, gap), (token_, logp_, gap_) in zip(stream, other[key], strict=False):
            compared += 1
            if token != token_:
                gaps.append(min(gap, gap_))
                break
            apart.append(abs(logp - logp_))
    mean = float(torch.tensor(apart).mean())
    print(
        f"{what:<24} {compared} tokens, {len(gaps)} parted (gaps up to {max(gaps, default=0):.3g}); logp_raw apart by "
        f"{mean:.2g} on average, {max(apart):.2g} at most",
        flush=True,
    )
    record({"what": f"parted: {what}", "tokens": compared, "gaps": gaps, "mean": mean, "most": max(apart)})


if __name__ == "__main__":
    main()
