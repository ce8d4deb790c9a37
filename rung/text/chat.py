"""Conversations to token ids through the model's own chat template (Jinja, sandboxed).

A template writes control tokens around what people say.  What people say is only text: `<|im_end|>` inside a message
must stay letters, or whoever writes a message can close it and speak as the system.  So every place where a message
spells a control token (or begins one at its end) is broken by a mark, the template is rendered, control tokens are
found, and the stretches between them are encoded as plain text without the marks.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rung.core.errors import ModelError
from rung.core.words import Message
from rung.text.pretrained import Tokenizer

MARKS = range(0xE000, 0xF8FF)  # Unicode's private use area: one that no message holds is taken


def prompt_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> tuple[int, ...]:
    """Token ids of a conversation, by default with the opening of the answer that is wanted.

    What stands before the first message without a system message is the template's business (SmolLM2 adds its own).
    Raises ModelError when the model has no template, or the template refuses the messages.
    """
    mark = unused_mark(messages)
    text = render(tokenizer, harmless(tokenizer, messages, mark), add_generation_prompt=add_generation_prompt)
    return encoded(tokenizer, text, mark)


def unused_mark(messages: Sequence[Message]) -> str:
    """A character that no message holds.  Raises ModelError where there is none."""
    used = {char for message in messages for char in message.content}
    mark = next((chr(code) for code in MARKS if chr(code) not in used), None)
    if mark is None:
        raise ModelError("the messages hold every character of Unicode's private use area; one has to be left.")
    return mark


def harmless(tokenizer: Tokenizer, messages: Sequence[Message], mark: str) -> list[dict[str, str]]:
    """Messages as a template takes them, every spelling of a control token in them broken by the mark."""
    return [{"role": m.role, "content": _broken(m.content, tokenizer.special, mark)} for m in messages]


def encoded(tokenizer: Tokenizer, text: str, mark: str) -> tuple[int, ...]:
    """Token ids of a rendered text: control tokens are those of the template, and the marks are gone."""
    if mark not in text:
        return tuple(tokenizer.encode_control(text))
    ids: list[int] = []
    for piece in control_split(tokenizer, text):
        control = tokenizer.special.get(piece)
        ids += tokenizer.encode(piece.replace(mark, "")) if control is None else [control]
    return tuple(ids)


def control_split(tokenizer: Tokenizer, text: str) -> list[str]:
    """Stretches of plain text and the control tokens between them, in turns; a stretch comes first and last."""
    return re.split(f"({_any_of(tokenizer.special)})", text) if tokenizer.special else [text]


def render(tokenizer: Tokenizer, turns: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
    """The template's text for these turns.

    `strftime_now` is not offered, so that a prompt does not change with the date: templates then write a fixed one.
    """
    import jinja2

    if tokenizer.template is None:
        raise ModelError("the model has no chat template: give a plain text prompt, or a model trained to converse.")
    try:
        return _compiled(tokenizer.template).render(
            messages=list(turns), add_generation_prompt=add_generation_prompt, **tokenizer.names
        )
    except jinja2.TemplateError as error:
        raise ModelError(f"the chat template refused the messages: {error}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """Compiled with the switches, filters and functions that published templates are written for  [transformers]."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks answers for training; its content is all that matters here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = refuse
    return env.from_string(template)


def _broken(content: str, special: Mapping[str, int], mark: str) -> str:
    """The content with a mark after the first character of everything that spells a control token, or begins one."""
    if not special:
        return content
    content = re.sub(_any_of(special), lambda found: found[0][0] + mark + found[0][1:], content, flags=re.IGNORECASE)
    end = content.rstrip()
    for token in special:
        for size in range(len(token) - 1, 0, -1):
            if end.endswith(token[:size]):
                at = len(end) - size + 1
                return content[:at] + mark + content[at:]
    return content


def _any_of(special: Mapping[str, int]) -> str:
    return "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
