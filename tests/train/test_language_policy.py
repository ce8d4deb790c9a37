"""What the learner scores is what the engine drew from, on decoders with windows, soft-caps and further norms."""

from dataclasses import replace

import torch
from train.tiny import tiny_decoder

from rung.core.records import GroupRequest, Sampling
from rung.engine.engine import Engine
from rung.lm.config import MLPSpec
from rung.lm.decoder import Decoder
from rung.train.data import count, pack_one, sample_of
from rung.train.grpo import gap
from rung.train.policy import LanguagePolicy

PROMPTS = [(1, 2, 3), (9, 8, 7, 6, 5, 4)]


def like_gemma(dtype: torch.dtype) -> Decoder:
    """A window of 4 in the first layer, caps on scores and logits, norms everywhere; weights of order one."""
    config = tiny_decoder().config
    near = replace(config.blocks[0].mixer, window=4, softcap=2.0, scale=0.3, qk_norm="head", norm="offset")
    channel = MLPSpec(width=40, activation="gelu_tanh")
    block = replace(config.blocks[0], mixer=near, channel=channel, norms="both", norm="offset")
    blocks = (block, replace(block, mixer=replace(near, window=0)))
    config = replace(config, blocks=blocks, norm="offset", embedding_scale=24**0.5, logit_softcap=3.0)
    decoder = Decoder(config, dtype).init_(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(15)
    return decoder


def gaps(decoder: Decoder, scorer: Decoder) -> torch.Tensor:
    """|log-prob when drawn - when scored| of every sampled token."""
    sampling = Sampling(max_tokens=12, temperature=0.8, stop_ids=(257,))
    requests = [GroupRequest(prompt_ids=p, keys=tuple(range(4)), sampling=sampling) for p in PROMPTS]
    groups, _ = Engine(decoder).run(requests)
    samples = [
        sample_of(prompt, completion, problem_id=str(i), group_id=i, reward=0.0)
        for i, (prompt, group) in enumerate(zip(PROMPTS, groups, strict=True))
        for completion in group
    ]
    batch = pack_one(samples, counts=count(samples))
    return gap(batch, LanguagePolicy(scorer, 0.8).scores(batch))


def test_the_engine_draws_from_the_capped_law_that_the_learner_scores():
    decoder = like_gemma(torch.float32)
    assert gaps(decoder, decoder).max() < 1e-4
    for changes in ({"logit_softcap": 0.0}, {"logit_softcap": 2.9}, {"embedding_scale": 1.0}):
        other = Decoder(replace(decoder.config, **changes))
        other.load_state_dict(decoder.state_dict())
        assert gaps(decoder, other).mean() > 1e-2, changes


def test_in_bf16_the_capped_laws_differ_by_roundings_only():
    decoder = like_gemma(torch.bfloat16)
    assert gaps(decoder, decoder).mean() < 0.05
