"""Requests of the OpenAI-compatible routes in the words of the inference service."""

import hashlib
import json
from typing import Any

from api.auth import Principal
from api.schemas.chat import ChatCompletionRequest, ChatMessage
from api.schemas.completions import CompletionRequest
from api.schemas.sampling import GenerationRequest, ResponseFormat

__all__ = ["generation_payload", "message_payload"]

Payload = dict[str, Any]

SAME_NAMES = (
    "frequency_penalty", "guided_regex", "ignore_eos", "min_p", "min_tokens", "n",
    "presence_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids", "temperature",
    "top_p",
)  # fmt: skip


def generation_payload(
    request: GenerationRequest, artifact_id: str, principal: Principal
) -> Payload:
    """Say what is to be generated, with which model and for whom."""
    payload: Payload = {name: getattr(request, name) for name in SAME_NAMES}
    payload |= {
        "artifact_id": artifact_id,
        "tenant": principal.key_id,
        "cache_salt": _cache_salt(principal.tenant_id),
        "max_tokens": request.token_limit,
        # both 0 and -1 mean all to one server or another
        "top_k": max(0, request.top_k or 0),
        "logit_bias": sorted(request.logit_bias.items()),
        "response_format": _format_payload(request.response_format),
    }
    match request:
        case ChatCompletionRequest():
            payload["messages"] = [message_payload(each) for each in request.messages]
            payload["tools"] = [each.model_dump() for each in request.shown_tools]
            payload["logprobs"] = request.top_logprobs if request.logprobs else None
        case CompletionRequest():
            payload["prompts"] = request.prompt
            payload["logprobs"] = request.logprobs
            payload["echo"] = request.echo
    return payload


def message_payload(message: ChatMessage) -> Payload:
    """Give a turn the members that it has; templates look whether one is there."""
    return message.model_dump(exclude_none=True)


def _format_payload(wanted: ResponseFormat | None) -> Payload | None:
    if wanted is None or wanted.type == "text":
        return None
    schema = wanted.json_schema
    return {
        "kind": wanted.type,
        # in one order, so that a schema is compiled once however it was written
        "text": "" if schema is None else json.dumps(schema.schema_, ensure_ascii=False),
    }


def _cache_salt(tenant_id: str) -> str:
    # a prefix cache shared between tenants would tell one, by its time, what another wrote
    return hashlib.sha256(tenant_id.encode()).hexdigest()[:16]
