"""Requests of the API process as a model takes them: token ids, and the engine's own names."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from api.errors import (
    ContextTooLong,
    InferenceOverloaded,
    InferenceUnavailable,
    ServiceError,
    UnsupportedParameter,
)
from engine.errors import ContextLengthExceeded, EngineError, EngineOverloaded
from engine.inference.engine import InferenceEngine
from engine.inference.request import GenerationRequest, RequestInvalid
from engine.inference.text import TextCodec
from worker.inference.schemas import DetokenizeBody, GenerateBody, MessageBody, TokenizeBody

__all__ = [
    "GenerationRefused", "detokenize", "guide_field", "named_for", "read_requests", "tokenize",
]  # fmt: skip

GUIDE = "guide"


class GenerationRefused(ServiceError):
    """The request can never be served."""

    code = "invalid_request"
    status = 400


def read_requests(body: GenerateBody, engine: InferenceEngine) -> tuple[GenerationRequest, ...]:
    """Make one request of each prompt.

    Raises:
        GenerationRefused: naming the field.
        UnsupportedParameter: the model has no place for a field.
    """
    try:
        return tuple(_request(body, ids) for ids in _prompt_ids(body, engine.text))
    except RequestInvalid as error:
        raise _refused(error, body) from error


@contextmanager
def named_for(body: GenerateBody) -> Iterator[None]:
    """Put what an engine refuses in the words of the endpoint.

    Raises:
        ServiceError: instead of an `EngineError` of the block.
    """
    try:
        yield
    except ContextLengthExceeded as error:
        raise ContextTooLong(error.message, param=error.field) from error
    except RequestInvalid as error:
        raise _refused(error, body) from error
    except EngineOverloaded as error:
        raise InferenceOverloaded(error.message) from error
    except EngineError as error:
        # unloaded meanwhile, or broken for good
        raise InferenceUnavailable(error.message) from error


def guide_field(body: GenerateBody) -> str:
    """Which of the two fields that make a guide the caller sent."""
    return "response_format" if body.guided_regex is None else "guided_regex"


def tokenize(body: TokenizeBody, engine: InferenceEngine) -> dict[str, Any]:
    """Turn a text or a conversation into ids.

    Raises:
        GenerationRefused: naming the field.
    """
    try:
        if body.messages is not None:
            ids = _chat_ids(body.messages, (), engine.text)
        else:
            ids = engine.text.encode(body.prompt or "", with_specials=body.add_special_tokens)
    except RequestInvalid as error:
        raise GenerationRefused(error.message, param=error.field) from error
    spelled = [engine.text.spell(each).text for each in ids] if body.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": engine.context_length,
        "tokens": ids,
        "token_strs": spelled,
    }


def detokenize(body: DetokenizeBody, engine: InferenceEngine) -> dict[str, Any]:
    """Turn ids into a text, special tokens included.

    Raises:
        GenerationRefused: an id is no token.
    """
    size = engine.text.vocabulary
    for token_id in body.tokens:
        if not 0 <= token_id < size:
            raise GenerationRefused(
                f"tokens = {token_id} is not possible: use ids below {size}", param="tokens"
            )
    return {"prompt": engine.text.decode(body.tokens, with_specials=True)}


def _request(body: GenerateBody, ids: tuple[int, ...]) -> GenerationRequest:
    """The one place where a field's name here meets its name in the engine."""
    return GenerationRequest(
        prompt_ids=ids,
        # a prompt that is only scored is checked as if one token followed
        max_tokens=1 if body.max_tokens == 0 and body.echo else body.max_tokens,
        min_tokens=body.min_tokens,
        n=body.n,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
        logit_bias=body.logit_bias,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=body.ignore_eos,
        logprobs=body.logprobs,
        guide=body.guide,
        tenant=body.tenant,
        cache_salt=body.cache_salt,
    )


def _prompt_ids(body: GenerateBody, text: TextCodec) -> list[tuple[int, ...]]:
    if body.messages is not None:
        return [_chat_ids(body.messages, body.tools, text)]
    return [each if isinstance(each, tuple) else text.encode(each) for each in body.prompts or ()]


def _chat_ids(
    messages: Sequence[MessageBody], tools: Sequence[dict[str, Any]], text: TextCodec
) -> tuple[int, ...]:
    if tools and not text.has_tool_template:
        raise UnsupportedParameter(
            "tools are not possible: the model's chat template has no place for them; leave them"
            " out or choose another model",
            param="tools",
        )
    return text.encode_chat([each.for_template() for each in messages], tools)


def _refused(error: RequestInvalid, body: GenerateBody) -> GenerationRefused:
    """Name the field as the caller does, who knows two that make a guide."""
    param = guide_field(body) if error.field == GUIDE else error.field
    return GenerationRefused(error.message, param=param)
