"""Conversations to token ids through the model's own chat template (Jinja, in a child process with limits).

A template writes control tokens around what people say.  What people say is only text: `<|im_end|>` inside a message
must stay letters, or whoever writes a message can close it and speak as the system.  So every place where a message
spells a control token (or begins one at its end) is broken by a mark, the template is rendered, control tokens are
found, and the stretches between them are encoded as plain text without the marks.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from rung.core.errors import ModelError
from rung.core.words import Message
from rung.text.pretrained import Tokenizer
from rung.text.renderer import CPU_SECONDS, MAX_TEXT, MEMORY_BYTES

MARKS = range(0xE000, 0xF8FF)  # Unicode's private use area: one that no message holds is taken
MAX_TEMPLATE = 1 << 20  # characters; the longest that is known has 30 000
MAX_ANSWER = 12 * MAX_TEXT + 64  # bytes of a line: JSON writes a character in 12 at most
LATE = b"late"
WALL_SECONDS = 60.0  # on a machine that is busy with other things
KILLED = (-signal.SIGKILL, -signal.SIGTERM)  # by somebody else: our limits end a child by SIGXCPU
KEPT = ("PYTHONHOME", "LD_LIBRARY_PATH")  # of the environment: without them some Pythons do not start


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
    if tokenizer.template is None:
        raise ModelError("the model has no chat template: give a plain text prompt, or a model trained to converse.")
    values = {"messages": list(turns), "add_generation_prompt": add_generation_prompt, **tokenizer.names}
    return _renderer().render(tokenizer.template, values)


class Renderer:
    """A child that renders templates (`renderer.py`), started when it is needed and again when it has died."""

    def __init__(self, *, cpu_seconds: int = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._lock, self._owner = threading.Lock(), 0
        self._child: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize | None = None

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """Raises ModelError where the template refuses, fails, or needs more than the child may have."""
        if len(template) > MAX_TEMPLATE:
            raise ModelError(f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE} are taken.")
        with self._lock:
            try:
                answer = self._ask({"template": template, "values": dict(values)})
            except BaseException:  # Ctrl-C, too: an answer that comes late would be taken for the next one's
                self.close()
                raise
        if "text" not in answer:
            raise ModelError(f"the chat template refused the messages: {answer['refused']}")
        return answer["text"]

    def close(self) -> None:
        """End the child."""
        if self._end is not None:
            self._end()
        self._child = self._end = None

    def _ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        """What the child answers.  One that somebody else killed is replaced, once: the template did not do it."""
        for _ in range(2):
            child = self._living()
            try:
                child.stdin.write(json.dumps(request).encode() + b"\n")
                child.stdin.flush()
                ready, _, _ = select.select([child.stdout], [], [], WALL_SECONDS)
                line = child.stdout.readline(MAX_ANSWER) if ready else LATE
            except BrokenPipeError:
                line = b""
            if line.endswith(b"\n"):
                return json.loads(line)
            if line or child.wait() not in KILLED:  # nothing at all comes out of a dead child's pipe
                break
            self.close()
        needed = f"it needed more than {self._cpu_seconds} s or {MEMORY_BYTES >> 20} MB, or crashed"
        raise ModelError(
            f"the chat template refused the messages: {needed}. Put another chat_template.jinja into its "
            "folder, or give plain text prompts."
        )

    def _living(self) -> Any:
        if self._child is None or self._owner != os.getpid():  # a fork of this process shares no pipe with it
            path = os.pathsep.join(entry for entry in sys.path if entry)
            child = subprocess.Popen(
                [sys.executable, "-P", "-s", str(Path(__file__).with_name("renderer.py")), str(self._cpu_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={"PYTHONPATH": path, "PYTHONUTF8": "1", **{n: os.environ[n] for n in KEPT if n in os.environ}},
                start_new_session=True,  # Ctrl-C is the parent's
            )
            self._owner, self._child = os.getpid(), child
            self._end = weakref.finalize(self, _end, child, self._owner)
        return self._child


@lru_cache(maxsize=1)
def _renderer() -> Renderer:
    return Renderer()


def _end(child: subprocess.Popen, owner: int) -> None:
    if owner == os.getpid():
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        with suppress(OSError):  # what was still to be written
            assert pipe is not None
            pipe.close()


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
