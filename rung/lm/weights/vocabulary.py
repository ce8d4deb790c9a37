"""The vocabulary inside a GGUF file as a Hugging Face tokenizer.

    gpt2    byte-level BPE: tokens, merges, and the name of the rule that cuts text before it    [Llama 3, Qwen, SmolLM]
    llama   SentencePiece's BPE: tokens with scores; the pair whose union scores best is joined first   [Llama 2]

Merges of the second kind follow from its scores, as transformers derives them.  Tokens that control, or stand for a
byte, take no part in merges: text never becomes one of them.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rung.core.errors import ModelError, nearest

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types  [gguf specification]
ADDED = (UNKNOWN, CONTROL, USER_DEFINED)
SPACE = "▁"  # SentencePiece's letter for a space
CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
DIGIT = r"\p{N}"
GPT2 = rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
LLAMA3 = (
    rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: Mapping[str, Sequence[str]] = {  # name -> expressions; each cuts what the one before has left whole
    "gpt-2": (GPT2,),
    "smollm": (DIGIT, GPT2),
    "llama-bpe": (LLAMA3,),
    "qwen2": (LLAMA3.replace("{1,3}", ""),),
    # what llama.cpp cuts by where a file names no rule
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
WHOLE_WORDS = ("llama-bpe",)  # a word that is a token stays one, whatever the merges say
COMPOSED = ("qwen2",)  # text is brought into Unicode's form NFC first


def tokenizer(facts: Mapping[str, Any], *, where: str):
    """The `tokenizers.Tokenizer` of a GGUF's metadata.  Raises ModelError with what was needed."""
    model = str(facts.get("tokenizer.ggml.model"))
    if model not in MODELS:
        raise ModelError(
            f"{where}: needed a vocabulary of kind {' or '.join(map(repr, MODELS))}, found {model!r}. Load the "
            "model's Hugging Face folder, whose tokenizer.json says it in full."
        )
    try:
        words, kinds = _strings(facts, "tokens"), _kinds(facts)
        made = MODELS[model](facts, words, kinds, where)
        _add(made, words, kinds)
        _surround(made, facts, words, default_bos=model == "llama")
        return made
    except ModelError:
        raise
    except BaseException as error:  # the library raises bare Exceptions, and panics that are not even those
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ModelError(f"{where}: the vocabulary cannot be used ({type(error).__name__}: {error}).") from error


def _byte_level(facts: Mapping[str, Any], words: Sequence[str], kinds: Sequence[int], where: str):
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    split = facts.get("tokenizer.ggml.pre", "default")
    if split not in PRE_TOKENIZERS:
        raise ModelError(f"{where}: unknown pre-tokenizer {split!r}. {nearest(str(split), PRE_TOKENIZERS)}")
    vocab = {word: i for i, word in enumerate(words[: _ordinary(kinds)])}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in _strings(facts, "merges"))]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split in WHOLE_WORDS))
    if split in COMPOSED:
        made.normalizer = normalizers.NFC()
    *first, last = PRE_TOKENIZERS[split]
    first += [] if last is GPT2 else [last]  # the library has GPT-2's rule, and digits, built in: in the files, too
    digits = pre_tokenizers.Digits(individual_digits=True)
    cuts = [digits if p is DIGIT else pre_tokenizers.Split(Regex(p), behavior="isolated") for p in first]
    into_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=last is GPT2)
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, into_bytes])
    made.decoder = decoders.ByteLevel()
    return made


def _sentence_piece(facts: Mapping[str, Any], words: Sequence[str], kinds: Sequence[int], where: str):
    import tokenizers
    from tokenizers import decoders, models, normalizers

    vocab = {word: i for i, word in enumerate(words)}
    scores = [float(score) for score in facts["tokenizer.ggml.scores"]]
    unknown = facts.get("tokenizer.ggml.unknown_token_id")
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocab, scores, kinds),
            unk_token=None if unknown is None else words[unknown],
            fuse_unk=True,
            byte_fallback=any(kind == BYTE for kind in kinds),
        )
    )
    spaces, prefixed = [normalizers.Replace(" ", SPACE)], facts.get("tokenizer.ggml.add_space_prefix", True)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaces] if prefixed else spaces)
    strip = [decoders.Strip(content=" ", left=1, right=0)] if prefixed else []
    joined = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*joined, *strip])
    return made


MODELS: Mapping[str, Callable[..., Any]] = {"gpt2": _byte_level, "llama": _sentence_piece}


def _merges(vocab: Mapping[str, int], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best score first; ties as transformers breaks them."""
    plain = {word: i for word, i in vocab.items() if kinds[i] in (NORMAL, UNUSED)}
    pairs = [
        (word[:cut], word[cut:], scores[i])
        for word, i in plain.items()
        for cut in range(1, len(word))
        if word[:cut] in plain and word[cut:] in plain
    ]
    pairs.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
    return [(left, right) for left, right, _ in pairs]


def _ordinary(kinds: Sequence[int]) -> int:
    """How many tokens come before the added ones that end the vocabulary: only these are BPE's own.

    A control token among BPE's words could be made of plain text; where one stands before ordinary words, it has to.
    """
    count = len(kinds)
    for droppable in ((UNUSED,), ADDED):
        while count and kinds[count - 1] in droppable:
            count -= 1
    return count


def _add(made: Any, words: Sequence[str], kinds: Sequence[int]) -> None:
    """Tokens that are found in text before it is cut, in the order of their ids."""
    import tokenizers

    added = [i for i, kind in enumerate(kinds) if kind in ADDED]
    for special, numbers in groupby(added, key=lambda i: kinds[i] != USER_DEFINED):
        tokens = [tokenizers.AddedToken(words[i], special=special, normalized=False) for i in numbers]
        (made.add_special_tokens if special else made.add_tokens)(tokens)
    for i in added:
        if made.token_to_id(words[i]) != i:
            raise ValueError(f"token {words[i]!r} becomes number {made.token_to_id(words[i])}, needed {i}")


def _surround(made: Any, facts: Mapping[str, Any], words: Sequence[str], *, default_bos: bool) -> None:
    """Begin and end every text with the tokens that the file asks for."""
    from tokenizers import processors

    pieces: dict[str, list[str]] = {"bos": [], "eos": []}
    for name, default in (("bos", default_bos), ("eos", False)):
        number = facts.get(f"tokenizer.ggml.{name}_token_id")
        if facts.get(f"tokenizer.ggml.add_{name}_token", default) and number is not None:
            pieces[name] = [words[number]]
    if special := [*pieces["bos"], *pieces["eos"]]:
        made.post_processor = processors.TemplateProcessing(
            single=[*pieces["bos"], "$A", *pieces["eos"]],
            pair=[*pieces["bos"], "$A", *pieces["eos"], *pieces["bos"], "$B:1", *pieces["eos"]],
            special_tokens=[(word, made.token_to_id(word)) for word in dict.fromkeys(special)],
        )


def _strings(facts: Mapping[str, Any], name: str) -> list[str]:
    found = facts["tokenizer.ggml." + name]
    if not isinstance(found, list):
        raise TypeError(f"its {name} are no strings")
    if name == "tokens" and len(set(found)) < len(found):
        raise ValueError("a token stands there twice")
    return found


def _kinds(facts: Mapping[str, Any]) -> list[int]:
    """The type of every token; without types all are ordinary."""
    words, kinds = facts["tokenizer.ggml.tokens"], facts.get("tokenizer.ggml.token_type")
    found = [NORMAL] * len(words) if kinds is None else [int(kind) for kind in kinds]
    if len(found) != len(words):
        raise ValueError(f"{len(words)} tokens and {len(found)} types of token")
    return found
