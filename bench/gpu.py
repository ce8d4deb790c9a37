"""On one GPU, by the shapes of Qwen2.5 with random weights in bf16: rollout against `transformers`, memory of LoRA.

Rollout: 64 streams of 512 tokens on prompts of 64, against generate with its growing cache, and with its static cache,
whose step transformers compiles.  Beside it our step as a share of its floor: bytes that it must read, weights and live
rows of the cache, over the bandwidth at which the device copies.  LoRA: the most that a learner's step holds at 7B.
--quick shows, on any machine, that both sides run: its numbers mean nothing.
"""

import statistics
import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch

from bench import workload
from bench.harness import Options, Side, Turn, announce, compare, measure, options, seconds, tokens_per_second

COMMON = {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
COMMON |= {"rope_theta": 1e6, "vocab_size": 151936, "tie_word_embeddings": True}


def shape(width: int, layers: int, heads: int, kv_heads: int, ffn_width: int, **rest: Any) -> dict[str, Any]:
    """The config.json of a Qwen2, which both sides read."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": ffn_width}
    return COMMON | sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | rest


SHAPES = {  # [Qwen 2024, Qwen2.5 technical report, table 1]
    "0.5b": shape(896, 24, 14, 2, 4864),
    "1.5b": shape(1536, 28, 12, 2, 8960),
    "7b": shape(3584, 28, 28, 4, 18944, vocab_size=152064, tie_word_embeddings=False),
}
TINY = shape(64, 2, 4, 2, 96, vocab_size=2000)
COPIED = 1 << 30  # bytes of the tensor whose copy measures bandwidth: more than any cache holds
LORA = {"rank": 16, "alpha": 32.0}
Job = Callable[[int], Turn]


def main() -> None:
    """Both shapes of rollout, then the learner's step."""
    parts = {"0.5b": rollout, "1.5b": rollout, "lora": learner}
    given = options(__doc__, parts=tuple(parts), model=False)
    if not (given.quick or torch.cuda.is_available()):
        sys.exit("bench.gpu needs a CUDA GPU, and PyTorch sees none here; --quick shows on a CPU that it runs")
    announce(given)
    for name, part in parts.items():
        if given.wants(name):
            part(name, given)


def rollout(name: str, given: Options) -> None:
    """Ours against both forms of generate, then our step against what the device could do."""
    streams, prompt, tokens = (4, 8, 6) if given.quick else (64, 64, 512)
    config = TINY if given.quick else SHAPES[name]
    prompts = workload.prompts(streams, prompt, prompt, vocabulary=config["vocab_size"])
    spec = {"config": config, "device": _device(), "prompts": prompts, "tokens": tokens}
    ours = Side(name="rung", job="bench.gpu:ours", spec=spec)
    what = f"Qwen2.5-{name} shape, {streams} streams of {tokens} tokens after {prompt}"
    for cache, bar in (("dynamic", ">= 3"), ("static", ">= 1")):
        name_of_peer = f"transformers generate, {cache} cache"
        peer = Side(name=name_of_peer, job="bench.gpu:generate", spec={**spec, "cache": cache})
        result = compare(what, ours, [peer], tokens_per_second, unit="tokens/s", bar=bar, given=given)
    copied = {"device": _device(), "bytes": COPIED >> 10 * given.quick}
    copy = Side(name="copy", job="bench.gpu:bandwidth", spec=copied)
    speed = measure("bandwidth of a copy", copy, _gigabytes_per_second, unit="GB/s", bar="-", given=given)
    step = statistics.median(turn["decode"] / turn["steps"] for turn in result["turns"]["rung"])
    size = result["turns"]["rung"][0]["floor_bytes"]
    least = size / (speed["median"] * 1e9)
    print(
        f"  a step reads at least {size / 1e6:.0f} MB, {least * 1e3:.2f} ms at that bandwidth, and takes "
        f"{step * 1e3:.2f} ms: {least / step:.0%} of the floor; bar >= 40%"
    )


def learner(name: str, given: Options) -> None:
    """One LoRA step, activations checkpointed: forward, backward and AdamW over four groups of eight samples."""
    batch = workload.uneven(2, 2, (4, 8), (3, 6)) if given.quick else workload.uneven(4, 8, (64, 256), (128, 1024))
    spec = {"config": TINY if given.quick else SHAPES["7b"], "device": _device(), "batch": batch}
    side = Side(name="rung", job="bench.gpu:lora", spec=spec)
    if _device() == "cpu":
        measure("LoRA step, on a CPU: no memory of its own to tell", side, seconds, unit="s", bar="-", given=given)
        return
    what = f"LoRA step at the shape of Qwen2.5-7B, rank {LORA['rank']}: most memory allocated"
    measure(what, side, lambda turn: turn["device_bytes"] / 1e9, unit="GB", bar="<= 40 GB", given=given)


def ours(spec: Mapping[str, Any]) -> Job:
    """`Engine.run` over all streams at once; how long its decoding steps took, and what one had to read."""
    from rung.core.keys import derive_key
    from rung.core.records import GroupRequest, Sampling
    from rung.engine.engine import Engine

    decoder = _decoder(spec)
    engine, law = Engine(decoder, slots=len(spec["prompts"])), Sampling(max_tokens=spec["tokens"])
    floor = floor_bytes(decoder, len(spec["prompts"]), len(spec["prompts"][0]), spec["tokens"])

    def turn(number: int) -> Turn:
        requests = [
            GroupRequest(prompt_ids=tuple(prompt), keys=(derive_key(number, stream),), sampling=law)
            for stream, prompt in enumerate(spec["prompts"])
        ]
        taken, (drawn, stats) = _timed(lambda: engine.run(requests))
        tokens = sum(len(completion.token_ids) for group in drawn for completion in group)
        assert tokens == len(requests) * spec["tokens"]
        parts = {"decode": stats.seconds_decode, "steps": stats.steps, "floor_bytes": floor}
        return {"seconds": taken, "tokens": tokens, **parts}

    return turn


def generate(spec: Mapping[str, Any]) -> Job:
    """`transformers` generate on the same shape; with a static cache on a GPU it compiles its step."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(spec["device"]):
        config = AutoConfig.for_model(**spec["config"])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None  # lengths are forced
    model.generation_config.pad_token_id = 0
    model.generation_config.cache_implementation = spec["cache"]
    ids_BT = torch.tensor(spec["prompts"], device=spec["device"])
    law = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": spec["tokens"]}

    def turn(number: int) -> Turn:
        taken, out_BT = _timed(
            lambda: model.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), **law).cpu()
        )
        assert out_BT.shape[1] == ids_BT.shape[1] + spec["tokens"]
        return {"seconds": taken, "tokens": len(ids_BT) * spec["tokens"]}

    return turn


def bandwidth(spec: Mapping[str, Any]) -> Job:
    """Bytes read and written by copying one tensor to another, and the best of ten times."""
    source = torch.zeros(spec["bytes"], dtype=torch.uint8, device=spec["device"])
    target = torch.empty_like(source)

    def turn(number: int) -> Turn:
        return {"seconds": min(_timed(lambda: target.copy_(source))[0] for _ in range(10)), "bytes": 2 * spec["bytes"]}

    return turn


def lora(spec: Mapping[str, Any]) -> Job:
    """`Learner.step` on an adapter over a resting decoder in bf16; without a reference model, as trl's beta = 0."""
    from bench.ours import GRPO, completion_of
    from rung.lm.adapters.lora import Adapter, native_sites
    from rung.lm.adapters.spec import LoRA
    from rung.train.config import GroupRL, Optim
    from rung.train.data import count, pack, sample_of
    from rung.train.methods import build_objective, group_streams
    from rung.train.policy import LanguagePolicy
    from rung.train.step import Learner

    decoder = _decoder(spec)
    decoder.activation_checkpointing = True
    adapter = Adapter(decoder, native_sites(decoder), LoRA(**LORA), seed=0)
    optimiser = Learner(adapter.parameters, Optim(lr=1e-5), num_steps=100, dtype=torch.bfloat16)
    limit, samples = spec["batch"]["completion"][1], []
    for number, (prompt, completions, rewards) in enumerate(
        workload.batch(spec["batch"], spec["config"]["vocab_size"])
    ):
        group = [
            sample_of(prompt, completion_of(ids), problem_id=str(number), group_id=number, reward=reward)
            for ids, reward in zip(completions, rewards, strict=True)
        ]
        samples += group_streams(GRPO, group, max_tokens=limit)
    batches = pack(samples, counts=count(samples), tokens_per_batch=GroupRL.tokens_per_micro_batch)
    policy, objective = LanguagePolicy(decoder), build_objective(GRPO)

    def turn(number: int) -> Turn:
        on_gpu = spec["device"] != "cpu"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        taken, _ = _timed(lambda: optimiser.step(batches, policy, objective))
        return {"seconds": taken} | ({"device_bytes": torch.cuda.max_memory_allocated()} if on_gpu else {})

    return turn


def floor_bytes(decoder: Any, streams: int, prompt: int, tokens: int) -> float:
    """What a decoding step must read, on average over a rollout: the weights once, and every live row of the cache.

    The first token comes of the prefill; step k = 1 ... tokens - 1 reads prompt + k rows of each stream.  Of an untied
    embedding a step needs a row per stream, which is left out."""
    size = decoder.footprint()
    weights = size.parameters - (0 if decoder.unembedding is None else decoder.embedding.weight.numel())
    rows = streams * (prompt + tokens / 2)
    return decoder.embedding.weight.element_size() * (weights + rows * size.cached)


def _decoder(spec: Mapping[str, Any]) -> Any:
    from rung.lm.decoder import Decoder
    from rung.lm.weights.families import from_hugging_face

    decoder = Decoder(from_hugging_face(spec["config"], where="the bench"), torch.bfloat16, spec["device"])
    return decoder.init_(torch.Generator(spec["device"]).manual_seed(0)).eval()


def _gigabytes_per_second(turn: Turn) -> float:
    return turn["bytes"] / turn["seconds"] / 1e9


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device has done it, and the result."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = perf_counter()
    result = work()
    wait()
    return perf_counter() - start, result


if __name__ == "__main__":
    main()
