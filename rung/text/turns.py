"""What stands between two answers of a conversation, as token ids.

What a model sampled is never tokenised again: a stream of several turns grows by appending to it.

    prompt  answer 1, as sampled  |  end of turn, the environment's words, opening of the next answer  |  answer 2 ...

The middle part is the difference of two renderings of the chat template: of the conversation with the environment's
messages and the next opening, less everything up to the end of the answer.  Placeholders stand for what the assistant
said, so that neither a template that trims, nor anything that the model happens to say, can move the cut.

Three rules decide what a template leaves open:

- An end token that was sampled takes the place of the one that the template would write (it may be another one).  An
  answer that was cut off has none: the template's is appended, as a token that nobody sampled.
- The past is not rewritten.  A template that would render earlier turns otherwise (Qwen3 drops their thinking, Mistral
  moves the system message) is asked only for what follows the answer: the model goes on from what it really saw.
- A template that leaves the answer or one of the environment's messages out, or refuses their roles, is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import count

from rung.core.errors import ModelError
from rung.core.records import Origin
from rung.core.words import Message
from rung.text.chat import control_split, encoded, harmless, render, unused_mark
from rung.text.pretrained import Tokenizer

CACHED = 1024  # conversations, as far as the environment's part of them goes
Given = tuple[tuple[int, ...], tuple[Origin, ...]]  # token ids, and where each came from


def between(
    tokenizer: Tokenizer, messages: Sequence[Message], replies: Sequence[Message], *, end: int | None = None
) -> Given:
    """Token ids that follow an answer, up to where the next one begins, with their origins.

    messages: the conversation, the answer last;  end: the end token that was sampled, None where it was cut off
    replies:  what the environment says; a last one of the assistant's opens the next answer

    Control tokens, blanks and the template's own opening are TEMPLATE; a stretch between control tokens that holds
    anything else is TOOL, the name of a role included where the template writes it there.
    Raises ModelError where the template cannot say it.
    """
    words, opening = (replies[:-1], replies[-1].content) if replies[-1].role == "assistant" else (replies, "")
    said, placeholder = _answers_replaced(messages, words)
    ids, origins = _rendered(tokenizer, tokenizer.template, said, tuple(words), placeholder, end)
    own = tokenizer.encode(opening) if opening else []
    return (*ids, *own), (*origins, *[Origin.TOOL] * len(own))


@lru_cache(maxsize=CACHED)
def _rendered(
    tokenizer: Tokenizer,
    template: str | None,
    said: tuple[Message, ...],
    words: tuple[Message, ...],
    placeholder: str,
    end: int | None,
) -> Given:
    """What stands between two answers, from placeholders: samples that are told the same share it.

    template: the tokenizer's, so that another one is another key
    """
    _refuse_omissions(tokenizer, said, words, placeholder)
    tail, mark = _tail(tokenizer, (*said, *words), placeholder, opening=True)
    closed, _ = _tail(tokenizer, (*said, *words), placeholder, opening=False)
    start, anchor = 0, ""
    if end is not None:
        start = _end_written(tokenizer, tail, _tail(tokenizer, said, placeholder, opening=False)[0], end)
        anchor = tokenizer.token_of(end) if end in tokenizer.special.values() else ""
    ids = encoded(tokenizer, anchor + tail[start:], mark)[bool(anchor) :]  # some tokenizers see what stands before
    opens = len(closed) - start if tail.startswith(closed) else len(tail)
    return tuple(ids), tuple(_origins(tokenizer, ids, tail[start:], opens))


def _answers_replaced(messages: Sequence[Message], words: Sequence[Message]) -> tuple[tuple[Message, ...], str]:
    """The conversation with placeholders for what the assistant said, and the last of them, which is found nowhere."""
    taken = [message.content for message in (*messages, *words)]
    names = (f"Rung{n}answer" for n in count())
    last = next(name for name in names if not any(name in text for text in taken))
    said = [replace(m, content="answer") if m.role == "assistant" else m for m in messages[:-1]]
    return (*said, Message("assistant", last)), last


def _tail(tokenizer: Tokenizer, messages: Sequence[Message], placeholder: str, *, opening: bool) -> tuple[str, str]:
    """The template's text behind the placeholder, and the mark that breaks what messages spell."""
    mark = unused_mark(messages)
    text = render(tokenizer, harmless(tokenizer, messages, mark), add_generation_prompt=opening)
    _, *tails = text.split(placeholder)
    if len(tails) != 1:
        raise ModelError(
            f"the chat template writes an answer {len(tails)} times instead of once when the conversation goes on, so "
            "that several turns cannot be appended to each other: use a model with another template, or set max_turns "
            "to 1."
        )
    return tails[0], mark


def _end_written(tokenizer: Tokenizer, tail: str, closing: str, end: int) -> int:
    """Characters of the tail that the sampled end token stands for: the end token of the template, and blanks before.

    closing: the tail of a conversation that ends with the answer.  What the tail has and it has not begins the next
    message (GLM ends an answer with the token that names the next speaker): only an equal one is left out.
    """
    ends = rf"\s*({'|'.join(re.escape(tokenizer.token_of(i)) for i in tokenizer.eos_ids)})"
    written = re.match(ends, tail)
    if written is None or not (re.match(ends, closing) or written[1] == tokenizer.token_of(end)):
        return 0
    return written.end()


def _refuse_omissions(
    tokenizer: Tokenizer, said: Sequence[Message], words: Sequence[Message], placeholder: str
) -> None:
    """Raises ModelError for a message that the template would leave out in silence."""
    named = [replace(message, content=f"{placeholder}word{n}") for n, message in enumerate(words)]
    text = render(tokenizer, harmless(tokenizer, [*said, *named], ""), add_generation_prompt=True)
    for message, shown in zip(words, named, strict=True):
        if shown.content not in text:
            raise ModelError(
                f"the chat template leaves out what the environment says as {message.role!r}: let `reply` return a "
                "Message of another role; 'user' is understood by all."
            )


def _origins(tokenizer: Tokenizer, ids: Sequence[int], text: str, opens: int) -> list[Origin]:
    """Where each token came from: `text` is what `ids` say, and from `opens` on it is the next answer's opening."""
    control, kinds, at = set(tokenizer.special.values()), [], 0
    for number, piece in enumerate(control_split(tokenizer, text)):
        if number % 2 == 0:
            kinds.append(Origin.TEMPLATE if at >= opens or not piece.strip() else Origin.TOOL)
        at += len(piece)
    origins, stretch = [], 0
    for token in ids:
        stretch += token in control
        origins.append(Origin.TEMPLATE if token in control else kinds[stretch])
    return origins
