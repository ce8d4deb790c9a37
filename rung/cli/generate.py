"""`rung generate MODEL PROMPT...`"""

import sys
from dataclasses import dataclass
from typing import Literal

from rung.cli import options
from rung.cli.display import Display
from rung.report.visible import visible

COMMAND = "rung generate"


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Answer prompts; the texts alone go to stdout, in the order of the prompts, each ended by a line break.

    model: a name (`rung models`), a Hugging Face folder, a .gguf file, or an id of the Hub (org/name)
    prompt: what a user says to the model; - reads it from stdin
    raw: the prompt is not said to the model but continued by it
    max_tokens: most tokens of an answer
    temperature: 0 always takes the likeliest token
    top_k: draw only from this many of the likeliest tokens (0: all)
    top_p: draw only from the likeliest tokens that hold this probability together
    min_p: draw only from tokens with at least this share of the likeliest one's probability
    seed: equal seeds give equal texts
    dtype: auto is bf16 where the machine multiplies it fast, else fp32
    device: cpu, cuda, or cuda:1 for the second of several GPUs
    foreign: through transformers although Rung has the model's family
    """

    model: str
    prompt: tuple[str, ...]
    raw: bool = False
    max_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "cpu"
    foreign: bool = False


def help(args: list[str]) -> str:
    return options.help_of(Generate, COMMAND)


def run(args: list[str]) -> None:
    asked = options.read(Generate, args, command=COMMAND)
    import rung

    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in asked.prompt]
    with Display() as display:
        model = rung.load(asked.model, dtype=asked.dtype, device=asked.device, foreign=asked.foreign, listener=display)
        generations = rung.generate(
            model,
            prompts,
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            min_p=asked.min_p,
            seed=asked.seed,
            chat=False if asked.raw else None,
        )
    for generation in generations:
        print(visible(generation.text) if sys.stdout.isatty() else generation.text)
