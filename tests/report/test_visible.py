"""What a terminal or a page is shown of text that a model chose."""

import sys
import unicodedata

from rung.report.visible import one_line, visible


def test_no_character_that_steers_a_terminal_is_left():
    steering = [
        chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs")
    ]
    kept = [char for char in steering if char in visible(char)]
    assert kept == ["\t", "\n", "\u200c", "\u200d"]  # tabs and line breaks are text; the joiners shape emoji and words


def test_control_characters_become_pictures_of_themselves():
    assert visible("\x1b[31mred\x07\x00\x7f") == "␛[31mred␇␀␡"
    assert visible("\x9b31m \u202eabc") == "<U+009B>31m <U+202E>abc"  # one-byte CSI; right-to-left override
    assert visible("a\rb\r\nc") == "a␍b␍\nc"  # a carriage return would write over what was said


def test_ordinary_text_of_any_script_is_left_alone():
    for text in ("plain", "tab\tand\nline", "数学 naïve Ωμέγα", "👩‍🚀 family", "नमस्ते"):
        assert visible(text) == text


def test_one_line_holds_one_line_and_no_more_than_it_may():
    assert one_line("a\nb\tc") == "a␊b␉c"
    assert one_line("abcdefgh", width=5) == "abcd…"
    assert one_line("abcde", width=5) == "abcde"
