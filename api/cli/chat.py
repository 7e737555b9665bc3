"""`abq chat`: talk to a hosted model, one question or a conversation."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from api.cli.client import ApiClient
from api.cli.connection import JsonFlag
from api.cli.errors import CliError
from api.cli.events import parse_server_events
from api.cli.output import print_json, remark
from api.cli.session import open_client

__all__ = ["Reply", "chat_app", "stream_chat"]

chat_app = typer.Typer(add_completion=False)
END = "[DONE]"


@dataclass(slots=True)
class Reply:
    """An answer while it arrives: its text so far, why it ended, how long it is."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)


@chat_app.command()
def chat(  # noqa: PLR0913 - each option is a parameter
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A name from abq deploy list.")],
    prompt: Annotated[
        str | None, typer.Argument(help="One question; none: a conversation.")
    ] = None,
    *,
    system: Annotated[str | None, typer.Option(help="What the model should be.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Talk to a hosted model; an empty line or Ctrl-D ends a conversation."""
    request = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        **({"seed": seed} if seed is not None else {}),
    }
    messages = [{"role": "system", "content": system}] if system else []
    with open_client(context) as client:
        for question in [prompt] if prompt is not None else _questions():
            messages.append({"role": "user", "content": question})
            reply = Reply()
            for piece in stream_chat(client, {**request, "messages": messages}, reply):
                if not json_output:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            _end_reply(model, reply, json_output=json_output)
            messages.append({"role": "assistant", "content": reply.text})


def stream_chat(client: ApiClient, request: dict[str, Any], reply: Reply) -> Iterator[str]:
    """Yield the answer piece by piece and keep it in `reply`.

    Raises:
        CliError: if the model fails in the middle of its answer.
    """
    body = {**request, "stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/chat/completions", body=body) as response:
        for event in parse_server_events(response.iter_lines()):
            if event.data == END:
                return
            chunk = json.loads(event.data)
            if "error" in chunk:
                raise CliError(f"the answer broke off: {chunk['error']['message']}")
            piece = _take(chunk, reply)
            if piece:
                yield piece
    raise CliError("the answer broke off: the connection ended before the model had finished")


def _take(chunk: dict[str, Any], reply: Reply) -> str:
    reply.usage = chunk.get("usage") or reply.usage
    piece = ""
    for choice in chunk["choices"]:
        piece = choice["delta"].get("content") or ""
        reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
    reply.text += piece
    return piece


def _questions() -> Iterator[str]:
    """Read one question a line: from a person with a prompt, from a pipe without."""
    person = sys.stdin.isatty()
    while True:
        if person:
            sys.stderr.write("you> ")
            sys.stderr.flush()
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _end_reply(model: str, reply: Reply, *, json_output: bool) -> None:
    if json_output:
        answer = {"model": model, "text": reply.text, "finish_reason": reply.finish_reason}
        print_json({**answer, "usage": reply.usage}, indent=None)
        return
    sys.stdout.write("\n")
    if reply.finish_reason == "length":
        remark("(cut off at --max-tokens)", "dim")
