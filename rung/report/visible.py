"""Text that a model or a file chose, made safe to show: characters that would steer a terminal become visible ones."""

import unicodedata

CONTROL_PICTURES = 0x2400  # U+2400 shows NUL, U+2401 SOH, ..., U+241B ESC
DELETE, DELETE_PICTURE = 0x7F, "\u2421"
STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories: control, format (bidi), surrogate, line, paragraph
JOINERS = "\u200c\u200d"  # zero-width (non-)joiner: emoji and Indic words need them, and they steer nothing


def visible(text: str, *, keep: str = "\n\t") -> str:
    r"""`text` with every control character but those in `keep` replaced by a picture of it or by its code point.

    >>> visible("\x1b[2Jok\u202e")
    '␛[2Jok<U+202E>'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in keep else _shown(char) for char in text)


def one_line(text: str, *, width: int = 0) -> str:
    """`text` on one line, line breaks made visible too, cut to `width` characters where that is positive."""
    line = visible(text, keep="")
    return line[: width - 1] + "…" if 0 < width < len(line) else line


def _shown(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(CONTROL_PICTURES + code)
    if code == DELETE:
        return DELETE_PICTURE
    if unicodedata.category(char) in STEERING and char not in JOINERS:
        return f"<U+{code:04X}>"
    return char
