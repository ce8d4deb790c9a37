"""A pretrained tokenizer: text to ids and back.  Text is only ever text: a control token written in it stays letters.

`Tokenizer` reads what Hugging Face writes (tokenizer.json and the small files beside it) through the `tokenizers`
library.  Control tokens enter a prompt through a chat template (`chat.py`) or by their id, never through a string.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rung.core.errors import ModelError

REPLACEMENT = "�"  # what decoding puts for bytes that are not (yet) a character


class Tokenizer:
    """Made from the contents of a model folder's small files, by name (`from_files`).

    eos_ids: every token that ends an answer, from generation_config.json, config.json and the tokenizer's own
    special: the tokens that control, by text; template: the chat template or None
    """

    def __init__(
        self, tokenizer: Any, *, eos_ids: Sequence[int], names: Mapping[str, str], template: str | None = None
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._plain, self._control = tokenizer, tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        added = tokenizer.get_added_tokens_decoder()
        self.special: Mapping[str, int] = {token.content: i for i, token in added.items() if token.special}
        self.eos_ids = tuple(eos_ids)
        self.names = dict(names)
        self.template = template

    @staticmethod
    def from_files(files: Mapping[str, bytes], config: Mapping[str, Any], *, where: str) -> "Tokenizer":
        """`files` by name, `config` the model's config.json; raises ModelError when there is no tokenizer.json."""
        if "tokenizer.json" not in files:
            raise ModelError(
                f"{where} has no tokenizer.json: text cannot become tokens. Copy it from the model's folder."
            )
        import tokenizers

        settings, generation = (
            _json(files, name, where) for name in ("tokenizer_config.json", "generation_config.json")
        )
        names = {key: _content(value) for key, value in settings.items() if key.endswith("_token") and _content(value)}
        try:
            made = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
            last = made.token_to_id(names["eos_token"]) if "eos_token" in names else None
            ends = [config.get("eos_token_id"), generation.get("eos_token_id"), last]
            flat = [i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None]
            if not all(type(i) is int and i >= 0 for i in flat):
                raise ValueError(f"tokens that end an answer are {flat}")
            if "chat_template.jinja" in files:
                template: str | None = files["chat_template.jinja"].decode()
            else:
                template = _template(settings)
            return Tokenizer(made, eos_ids=tuple(dict.fromkeys(flat)), names=names, template=template)
        except BaseException as error:  # the library raises bare Exceptions, and panics that are not even those
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ModelError(
                f"{where}: the tokenizer's files cannot be used ({type(error).__name__}: {error})."
            ) from error

    def __len__(self) -> int:
        return self._plain.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text.  add_special_tokens: what the tokenizer puts around every input (a BOS, often)."""
        return self._plain.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_control(self, text: str) -> list[int]:
        """Token ids of trusted text (a template's), where special tokens are parsed as what they are."""
        return self._control.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._plain.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def id_of(self, token: str) -> int:
        """The id of one token by its own text (`<|im_end|>`); raises ModelError when there is none."""
        found = self._plain.token_to_id(token)
        if found is None:
            raise ModelError(f"the tokenizer has no token {token!r}.")
        return found

    def token_of(self, token_id: int) -> str:
        """The token's own text, in the vocabulary's spelling."""
        found = self._plain.id_to_token(token_id)
        if found is None:
            raise ModelError(f"the tokenizer has no token number {token_id}; it has {len(self)}.")
        return found


class TextStream:
    """Text of a growing sequence: `push` returns what a token adds, and waits where a character is unfinished.

    The pieces and `flush` together are `decode` of the whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []  # since the last point but one where the text was whole: decoders look back one token
        self._said = 0  # of self._ids, how many the text given out covers

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        before, now = self._decode(self._ids[: self._said]), self._decode(self._ids)
        if len(now) == len(before) or now.endswith(REPLACEMENT):
            return ""
        self._ids, self._said = self._ids[self._said :], len(self._ids) - self._said
        return now[len(before) :]

    def flush(self) -> str:
        """What is left: the replacement characters of bytes that never became a character."""
        before, now = self._decode(self._ids[: self._said]), self._decode(self._ids)
        self._ids, self._said = [], 0
        return now[len(before) :]


def stop_matcher(tokenizer: Tokenizer, stops: Sequence[str]) -> Callable[[], Callable[[int], bool]]:
    """For `GroupRequest.matcher`: per sample, a function of each new token: is a stop string complete?"""
    longest = max(map(len, stops))

    def new() -> Callable[[int], bool]:
        stream, tail = TextStream(tokenizer), ""

        def push(token_id: int) -> bool:
            nonlocal tail
            text = tail + stream.push(token_id)
            tail = text[max(0, len(text) - longest + 1) :]
            return any(stop in text for stop in stops)

        return push

    return new


def _json(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: {name} is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ModelError(f"{where}: {name} needed a JSON object, found {type(found).__name__}.")
    return found


def _content(value: Any) -> str:
    """A special token is written as its text, or as an object that holds it."""
    held = value.get("content") if isinstance(value, dict) else value
    return held if isinstance(held, str) else ""


def _template(settings: Mapping[str, Any]) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones."""
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = {entry["name"]: entry["template"] for entry in given}.get("default")
    if not isinstance(given, str | None):
        raise TypeError("the chat template is no text")
    return given
