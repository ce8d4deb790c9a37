"""`rung chat MODEL`"""

import sys
from dataclasses import dataclass
from typing import Literal

from rung.cli import options
from rung.cli.display import Display
from rung.core.words import Message
from rung.report.visible import visible

COMMAND = "rung chat"


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk with a model: one line is one turn; an empty line, Ctrl-D or Ctrl-C ends.

    model: a name (`rung models`), a Hugging Face folder, a .gguf file, or an id of the Hub (org/name)
    system: what the model is told before the first turn
    max_tokens: most tokens of an answer
    temperature: 0 always takes the likeliest token
    seed: equal seeds and equal turns give equal answers
    dtype: auto is bf16 where the machine multiplies it fast, else fp32
    device: cpu, cuda, or cuda:1 for the second of several GPUs
    foreign: through transformers although Rung has the model's family
    """

    model: str
    system: str = ""
    max_tokens: int = 512
    temperature: float = 0.7
    seed: int = 0
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "cpu"
    foreign: bool = False


def help(args: list[str]) -> str:
    return options.help_of(Chat, COMMAND)


def run(args: list[str]) -> None:
    asked = options.read(Chat, args, command=COMMAND)
    import rung
    from rung.model.generate import stream

    with Display() as display:
        model = rung.load(asked.model, dtype=asked.dtype, device=asked.device, foreign=asked.foreign, listener=display)
    messages = [Message("system", asked.system)] if asked.system else []
    while said := _line():
        messages.append(Message("user", said))
        pieces = []
        try:
            for piece in stream(
                model,
                messages,
                max_tokens=asked.max_tokens,
                temperature=asked.temperature,
                seed=asked.seed + len(messages),
            ):
                pieces.append(piece)
                print(visible(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        except KeyboardInterrupt:
            print(flush=True)  # what was said stands on a line of its own
            raise
        print(flush=True)
        messages.append(Message("assistant", "".join(pieces)))


def _line() -> str:
    """The next turn, empty at the end of input; the sign that asks for it is no answer, so it goes to stderr."""
    asks, line = sys.stdin.isatty(), ""
    if asks:
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    finally:
        if asks and not line.endswith("\n"):  # Ctrl-C or Ctrl-D leaves the cursor beside the sign
            print(file=sys.stderr)
    return line.rstrip("\n")
