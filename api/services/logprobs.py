"""Log-probabilities in OpenAI's two shapes.

A token of the inference service is `{"token", "bytes", "characters", "logprob", "top": [[token,
bytes, logprob], ...]}`; one without anything before it has the logprob null. `characters` are those
of the choice's text that it completes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from api.schemas.answers import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)

__all__ = ["chat_logprobs", "completion_logprobs", "width_of"]

Token = Mapping[str, Any]


def chat_logprobs(tokens: Sequence[Token]) -> ChatLogprobs:
    """Write tokens as a chat's answer has them."""
    return ChatLogprobs(
        content=tuple(
            TokenLogprob(
                token=each["token"],
                logprob=each["logprob"],
                bytes=each["bytes"],
                top_logprobs=tuple(
                    TopLogprob(token=token, logprob=logprob, bytes=encoded)
                    for token, encoded, logprob in each["top"]
                ),
            )
            for each in tokens
        )
    )


def completion_logprobs(tokens: Sequence[Token], offset: int) -> CompletionLogprobs:
    """Write tokens as a completion has them.

    Args:
        tokens: in their order.
        offset: characters of the choice ahead of the first one.
    """
    offsets = []
    for each in tokens:
        offsets.append(offset)
        offset += width_of(each)
    return CompletionLogprobs(
        tokens=tuple(each["token"] for each in tokens),
        token_logprobs=tuple(each["logprob"] for each in tokens),
        top_logprobs=tuple(_top(each) for each in tokens),
        text_offset=tuple(offsets),
    )


def width_of(token: Token) -> int:
    """Characters of the choice's text that a token completes; its own where it does not say."""
    return int(token.get("characters", len(token["token"])))


def _top(token: Token) -> dict[str, float] | None:
    if token["logprob"] is None:
        return None
    top: dict[str, float] = {}
    # the token itself is always among them; of two tokens that read the same the likelier stays
    for text, _, logprob in (*token["top"], (token["token"], None, token["logprob"])):
        top[text] = max(logprob, top.get(text, logprob))
    return top
