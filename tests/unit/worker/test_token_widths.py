"""Where the tokens of a text start in it."""

from itertools import accumulate

import pytest

from engine.inference.spelling import TokenText
from worker.inference.token_widths import AnswerWidths, widths_in

START = TokenText(text="<s>", bytes=tuple(b"<s>"), is_special=True)


def tokens_of(*parts):
    return [START if part == "<s>" else token_of(part) for part in parts]


def token_of(part):
    encoded = part.encode() if isinstance(part, str) else part
    return TokenText(text=encoded.decode(errors="replace"), bytes=tuple(encoded))


def places(widths):
    return [0, *accumulate(widths)][:-1]


@pytest.mark.parametrize(
    ("text", "parts", "expected"),
    [
        ("ab c", ["ab", " c"], [0, 2]),
        # a character that takes two tokens, and one that shares a token with another's end
        ("🎉 ok", [b"\xf0\x9f", b"\x8e\x89", " ok"], [0, 0, 1]),
        ("é🎉x", ["é".encode() + b"\xf0", b"\x9f\x8e", b"\x89x"], [0, 1, 1]),
        # what opens a prompt is not in its text, nor is the blank ahead of its first word
        ("the end", ["<s>", " the", " end"], [0, 0, 3]),
        (" the", ["<s>", " ", " the"], [0, 0, 1]),
        ("<s>a", ["<s>", "<s>", "a"], [0, 3, 3]),
    ],
)
def test_tokens_of_a_prompt_start_where_they_stand_in_its_text(text, parts, expected):
    widths = widths_in(text, tokens_of(*parts))

    assert places(widths) == expected
    assert sum(widths) == len(text)


@pytest.mark.parametrize("parts", [["ﬁ", "ne"], ["f", "i", "ne and more"], [" FI", "NE"]])
def test_tokens_of_a_rewritten_text_never_start_behind_it(parts):
    widths = widths_in("fine", tokens_of(*parts))

    assert sum(widths) == 4
    assert all(0 <= place <= 4 for place in places(widths))


def test_tokens_of_an_answer_are_counted_without_special_ones():
    widths = AnswerWidths()

    told = [widths.add(each) for each in tokens_of("a", b"\xf0\x9f", "<s>", b"\x8e\x89", " ok")]

    assert told == [1, 0, 0, 1, 3]


def test_a_prompt_without_tokens_has_no_widths():
    assert widths_in("", []) == []
