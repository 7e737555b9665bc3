"""One answer as it grows: from chosen tokens to text, and when it ends; no tensors."""

from engine.errors import NoTokenDrawn
from engine.inference.request import FinishReason, GenerationChunk, GenerationRequest
from engine.inference.text import IncrementalDecoder, StopFilter, TextCodec

__all__ = ["Answer"]


class Answer:
    """Takes the tokens of one request and gives chunks."""

    def __init__(self, request: GenerationRequest, max_tokens: int, codec: TextCodec) -> None:
        self._max_tokens = max_tokens
        ends = frozenset[int]() if request.ignore_eos else codec.eos_ids
        self._end_ids = ends | frozenset(request.stop_token_ids)
        self._decoder = IncrementalDecoder(codec, request.prompt_ids)
        self._stops = StopFilter(request.stop)
        self._tokens = 0

    def accept(self, token_id: int) -> GenerationChunk:
        """Add a token; the chunk has a finish reason where the answer ends with it.

        Args:
            token_id: -1 where nothing could be drawn.

        Raises:
            NoTokenDrawn: if nothing was.
        """
        if token_id < 0:
            raise NoTokenDrawn
        self._tokens += 1
        if token_id in self._end_ids:
            return self._end(FinishReason.STOP)
        text = self._stops.push(self._decoder.push(token_id))
        if self._stops.is_stopped:
            return self._chunk(text, FinishReason.STOP)
        if self._tokens == self._max_tokens:
            return self._end(FinishReason.LENGTH, text)
        return self._chunk(text, None)

    def cancel(self) -> GenerationChunk:
        """End where it is."""
        return self._end(FinishReason.CANCELLED)

    def _end(self, reason: FinishReason, text: str = "") -> GenerationChunk:
        text += self._stops.push(self._decoder.finish())
        if self._stops.is_stopped:
            return self._chunk(text, FinishReason.STOP)
        return self._chunk(text + self._stops.finish(), reason)

    def _chunk(self, text: str, reason: FinishReason | None) -> GenerationChunk:
        return GenerationChunk(text=text, completion_tokens=self._tokens, finish_reason=reason)
