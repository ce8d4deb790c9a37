"""A model small enough to train in a second, as a folder, and a task that it can learn."""

import json
from pathlib import Path

import torch
from byte_tokenizer import BYTES

from rung.core.keys import derive_key
from rung.core.records import Completion, Sample, Sampling
from rung.lm.config import AttentionSpec, BlockSpec, DecoderConfig, MLPSpec, RopeSpec
from rung.lm.decoder import Decoder
from rung.model.model import new_model
from rung.train.config import GroupRL, Method, Optim, TaskSpec
from rung.train.data import sample_of

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"
)
TASK = '''"""The reward is the share of the letter a."""

problems = [{"prompt": f"say a {n}"} for n in range(40)]


def reward(problem, text):
    return sum(letter == "a" for letter in text) / max(len(text), 1)
'''


def tiny_decoder(seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    mixer = AttentionSpec(heads=3, kv_heads=1, head_dim=8, rope=RopeSpec(theta=1e4))
    block = BlockSpec(mixer=mixer, channel=MLPSpec(width=40), norm_eps=1e-5)
    config = DecoderConfig(vocab_size=258, width=24, blocks=(block, block), max_positions=256)
    decoder = Decoder(config, dtype=dtype).init_(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        decoder.embedding.weight.mul_(10)  # logits that are not all alike
    return decoder


def tiny_folder(path: Path, seed: int = 0) -> Path:
    """The model as a Hugging Face folder with a tokenizer of bytes, and the task beside it."""
    new_model(tiny_decoder(seed)).save(path)
    (path / "tokenizer.json").write_text(BYTES._plain.to_str())
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE}))
    (path.parent / "letters.py").write_text(TASK)
    return path


def tiny_recipe(folder: Path, **changes) -> GroupRL:
    """Six steps of 4 groups of 4 samples on the task of letters."""
    values = {
        "name": "tiny",
        "model": str(folder),
        "task": TaskSpec(name=f"{folder.parent / 'letters.py'}:reward"),
        "num_steps": 6,
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "max_tokens": 5,
        "method": Method(advantage="mean", denominator="constant"),
        "optim": Optim(lr=3e-3, warmup=2, schedule="cosine"),
        "dtype": "fp32",
        "eval_problems": 5,
        "eval_every": 3,
        "validation_problems": 3,
        "checkpoint_every": 2,
        "threads": 1,
    }
    return GroupRL(**(values | changes))


def made_samples(
    groups: int = 3, size: int = 3, *, seed: int = 0, vocabulary: int = 258, dtype: torch.dtype = torch.float64
) -> list[Sample]:
    """Groups with prompts and completions of different lengths, and random advantages, weights and log-probs."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(vocabulary, (length,), generator=draw).tolist()

    samples = []
    for group in range(groups):
        prompt = ids(2, 7)
        for number in range(size):
            tokens = ids(1, 6)
            completion = Completion(
                token_ids=tuple(tokens),
                logp_sampled=(-1.0,) * len(tokens),
                logp_raw=(-1.0,) * len(tokens),
                stop="length",
                policy_version=0,
                weights_hash="",
                sampling=Sampling(max_tokens=8),
                key=derive_key(group, number),
            )
            sample = sample_of(prompt, completion, problem_id=str(group), group_id=group, reward=0.0)
            streams = {
                name: torch.randn(len(sample.token_ids), generator=draw, dtype=dtype)
                for name in ("advantage", "logp_old", "logp_ref")
            }
            streams["weight"] = torch.rand(len(sample.token_ids), generator=draw, dtype=dtype)
            samples.append(Sample(**{**sample.__dict__, "streams": {**sample.streams, **streams}}))
    return samples


def weights_of(run_folder: Path) -> bytes:
    return (run_folder / "model" / "model.safetensors").read_bytes()


def stop_after(step: int, stage: str = "train"):
    """A listener that does what Ctrl-C does once `step` is done."""

    def listener(news):
        if news.stage == stage and news.done == step:
            raise KeyboardInterrupt

    return listener
