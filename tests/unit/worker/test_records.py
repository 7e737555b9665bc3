"""What the API process is told of prompts and answers."""

import pytest

from engine.inference.request import FinishReason, GenerationChunk
from engine.inference.spelling import TokenText
from worker.inference.arrivals import Arrival
from worker.inference.records import RecordWriter

SPELLED = [
    TokenText(text="<s>", bytes=tuple(b"<s>"), is_special=True),
    TokenText(text=" the", bytes=tuple(b" the")),
    TokenText(text=" end", bytes=tuple(b" end")),
]


class OpeningCodec:
    """Reads prompts as tokenizers do that open them with a special token and a blank."""

    def spell(self, token_id):
        return SPELLED[token_id]

    def decode(self, token_ids, *, with_specials):
        assert with_specials
        return "".join(SPELLED[each].text for each in token_ids)


@pytest.mark.parametrize(
    ("written", "text", "widths"),
    [("the end", "the end", [0, 3, 4]), (None, "<s> the end", [3, 4, 4])],
)
def test_an_echo_is_what_the_caller_wrote_or_what_his_ids_read(written, text, widths):
    writer = RecordWriter(OpeningCodec(), [(0, 1, 2)], 1, [written])

    [echo] = writer.start([[None] * 3])["echo"]

    assert echo["text"] == text
    assert [each["characters"] for each in echo["logprobs"]] == widths


def test_an_echo_without_scores_has_the_text_alone():
    writer = RecordWriter(OpeningCodec(), [(0, 1)], 2, ["the"])

    assert writer.start([()])["echo"] == [{"index": at, "text": "the"} for at in range(2)]


def test_an_end_counts_a_last_token_that_has_no_text():
    chunk = GenerationChunk(text="", completion_tokens=1, finish_reason=FinishReason.STOP)
    writer = RecordWriter(OpeningCodec(), [(0,)], 1)

    written = writer.write([Arrival(prompt=0, item=chunk, moment=0.0)])

    assert written == [{"type": "finish", "index": 0, "finish_reason": "stop", "tokens": 1}]
