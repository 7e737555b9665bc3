"""Token ids of texts and texts of token ids, as the tokenizer of a hosted model has them."""

from typing import Any

from anyio.to_thread import run_sync

from api.auth import Principal
from api.schemas.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from api.services.completions import Hosting
from api.services.deployments import find_hosted
from api.services.payloads import message_payload

__all__ = ["detokenize", "tokenize"]


async def tokenize(
    hosting: Hosting, principal: Principal, request: TokenizeRequest, request_id: str
) -> Tokenized:
    """Turn text into ids.

    Raises:
        ModelNotHosted: the tenant hosts no such model.
        ServiceError: what the inference service refused the request for.
    """
    messages = request.messages
    wanted = {
        "prompt": request.prompt,
        "messages": None if messages is None else [message_payload(each) for each in messages],
        "add_special_tokens": request.add_special_tokens,
        "return_token_strs": request.return_token_strs,
    }
    answer = await _ask(hosting, principal, request.model, "/tokenize", wanted, request_id)
    return Tokenized(**answer)


async def detokenize(
    hosting: Hosting, principal: Principal, request: DetokenizeRequest, request_id: str
) -> Detokenized:
    """Turn ids into text.

    Raises:
        ModelNotHosted: the tenant hosts no such model.
        ServiceError: what the inference service refused the request for.
    """
    wanted = {"tokens": request.tokens}
    answer = await _ask(hosting, principal, request.model, "/detokenize", wanted, request_id)
    return Detokenized(**answer)


async def _ask(
    hosting: Hosting,
    principal: Principal,
    model: str,
    path: str,
    wanted: dict[str, Any],
    request_id: str,
) -> dict[str, Any]:
    found = await run_sync(find_hosted, hosting.database, principal.tenant_id, model)
    body = {"artifact_id": found.artifact_id, **wanted}
    return await hosting.inference.ask(path, body, request_id)
