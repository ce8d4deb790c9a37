"""A tokenizer made here, one token per byte, and text that is hard on tokenizers."""

import random

from rung.text.pretrained import Tokenizer


def bytes_only() -> Tokenizer:
    """One token per byte, and two control tokens: 256 `<s>`, 257 `</s>`; every cut through a character is possible."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(made, eos_ids=(257,), names={})


BYTES = bytes_only()
PIECES = [
    *"0123456789",
    "  ", "\t", "\n\n", "\u00a0", "\u3000",
    "def f(x):\n    return x**2  # square", "if (a[i] != NULL) { free(a[i]); }", "self.", "->", "::", '"\\n"', "'s",
    "hello", " world", "Straße", "naïve", "İstanbul", "\ufb01", "½", "Ⅳ", "²", "٣", "१२",
    "你好", "世界", "日本語のテキスト", "한국어", "\uff0c。\uff01", "𠮷",
    "😀", "👩\u200d👩\u200d👧\u200d👦", "🇫🇷", "❤️", "👍🏽", "e\u0301", "\u200b", "\ufeff", "\x00", "\x7f", "﷽",
    "3.14159", "1,000,000", "-42", "0x1F", "https://example.org/?q=1&r=%20", "<b>", "<|", "|>", "«»",
]  # fmt: skip


def lines(count: int) -> list[str]:
    """Random joins of the pieces: digits, code, CJK, emoji, odd spaces."""
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.randint(3, 12))) for _ in range(count)]
