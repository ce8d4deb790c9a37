"""Text in, text out: prompts become token ids, the engine draws, tokens become text.

A generation depends on the weights, its prompt, its key and how tokens are drawn; not on the prompts beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rung.core.errors import RequestError
from rung.core.keys import derive_key
from rung.core.records import Completion, GroupRequest, Sampling
from rung.core.words import Message, Stop
from rung.engine.engine import Engine
from rung.model.model import Model
from rung.text.pretrained import TextStream, stop_matcher

SLOTS = 64  # sequences decoded at a time: beyond, a step of the engine costs in proportion

Prompt = str | Sequence[Message]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a model wrote.

    text:         without control tokens, and without the stop string
    token_ids:    what was sampled, end token and stop string included
    logp_sampled: log-probability of each, under the distribution it was drawn from
    stop:         eos, stop (a stop string) or length (max_tokens)
    """

    text: str
    token_ids: tuple[int, ...]
    logp_sampled: tuple[float, ...]
    stop: Stop


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    chat: bool | None = None,
) -> list[Generation]:
    """One generation per prompt, in their order.

    prompts: conversations, or strings.  chat: a string is what a user says (True), or text to be continued (False);
             None: True where the model has a chat template
    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 switch a filter off
    stop:    strings that end a generation; a control token's own text (`<|im_end|>`) may be among them
    seed:    the key of prompt i is derive_key(seed, i); `seeds` gives each prompt its own: derive_key(seeds[i])

    Raises RequestError for what the engine cannot serve (prompt and max_tokens beyond the context, ...), ModelError
    for a model without tokenizer or chat template.
    """
    sampling = _sampling(model, stop, max_tokens, temperature, top_k, top_p, min_p)
    requests = _requests(model, prompts, sampling, _strings(model, stop), seed, seeds, chat)
    if not requests:
        return []
    drawn, _ = _engine(model).run(requests)
    return [_generation(model, completion, stop) for (completion,) in drawn]


def stream(
    model: Model,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    chat: bool | None = None,
) -> Iterator[str]:
    """The text of `generate(model, [prompt], ...)[0]`, in pieces, as soon as no later token can change them."""
    sampling = _sampling(model, stop, max_tokens, temperature, top_k, top_p, min_p)
    strings = _strings(model, stop)
    requests = _requests(model, [prompt], sampling, strings, seed, None, chat)
    return _pieces(model, requests[0], strings)


def _pieces(model: Model, request: GroupRequest, strings: Sequence[str]) -> Iterator[str]:
    text, held = TextStream(model.tokenizer), ""
    for event in _engine(model).stream([request]):
        held += text.push(event.token)
        if event.completion is not None:
            break
        keep = _unsure(held, strings)
        if piece := held[: len(held) - keep]:
            held = held[len(held) - keep :]
            yield piece
    if rest := _cut(held + text.flush(), strings):
        yield rest


def _unsure(text: str, strings: Sequence[str]) -> int:
    """How many last characters of `text` could be the beginning of a stop string."""
    longest = max(map(len, strings), default=1)
    sizes = range(min(longest - 1, len(text)), 0, -1)
    return next((n for n in sizes if any(s.startswith(text[-n:]) for s in strings)), 0)


def _cut(text: str, strings: Sequence[str]) -> str:
    """`text` up to the first stop string."""
    return text[: min((at for s in strings if (at := text.find(s)) >= 0), default=len(text))]


def _engine(model: Model) -> Engine:
    return Engine(model.decoder, slots=SLOTS, max_positions=model.decoder.max_positions)


def _strings(model: Model, stop: Sequence[str]) -> list[str]:
    """The stop strings that are text."""
    if isinstance(stop, str) or "" in stop:
        raise RequestError(f"stop needs a list of strings that are not empty; {stop!r} came.")
    return [s for s in stop if s not in model.tokenizer.special]


def _sampling(
    model: Model, stop: Sequence[str], max_tokens: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> Sampling:
    special = model.tokenizer.special
    return Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop_ids=tuple(dict.fromkeys([*model.tokenizer.eos_ids, *(special[s] for s in stop if s in special)])),
    )


def _requests(
    model: Model,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    strings: Sequence[str],
    seed: int,
    seeds: Sequence[int] | None,
    chat: bool | None,
) -> list[GroupRequest]:
    if isinstance(prompts, str):
        raise RequestError(f"prompts needs a list; the string {prompts!r} came. Write [{prompts!r}].")
    if seeds is not None and len(seeds) != len(prompts):
        raise RequestError(f"seeds needs one number per prompt: {len(prompts)}; {len(seeds)} came.")
    keys = [derive_key(seed, i) for i in range(len(prompts))] if seeds is None else [derive_key(s) for s in seeds]
    matcher = stop_matcher(model.tokenizer, strings) if strings else None
    asked = model.tokenizer.template is not None if chat is None else chat
    return [
        GroupRequest(prompt_ids=_ids(model, prompt, asked), keys=(key,), sampling=sampling, matcher=matcher)
        for prompt, key in zip(prompts, keys, strict=True)
    ]


def _ids(model: Model, prompt: Prompt, chat: bool) -> tuple[int, ...]:
    if isinstance(prompt, str) and not chat:
        return tuple(model.tokenizer.encode(prompt, add_special_tokens=True))
    return model.prompt_ids([Message("user", prompt)] if isinstance(prompt, str) else prompt)


def _generation(model: Model, completion: Completion, strings: Sequence[str]) -> Generation:
    return Generation(
        text=_cut(model.tokenizer.decode(completion.token_ids), strings),
        token_ids=completion.token_ids,
        logp_sampled=completion.logp_sampled,
        stop=completion.stop,
    )
