"""What the OpenAI-compatible routes answer with."""

from typing import Literal, Self

from api.db.tables.artifacts import Deployment
from api.schemas.base import Schema

__all__ = [
    "AnswerMessage",
    "ChatChoice",
    "ChatCompletion",
    "ChatLogprobs",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "HostedModel",
    "PromptDetails",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
]


class PromptDetails(Schema):
    """What became of the prompt's tokens."""

    cached_tokens: int = 0
    """Tokens whose keys and values were there already."""


class Usage(Schema):
    """Counted tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()


class TopLogprob(Schema):
    """A token that could have come, and how likely it was."""

    token: str
    logprob: float
    """Natural logarithm."""
    bytes: tuple[int, ...] | None
    """Of the token in UTF-8, where one character takes several tokens."""


class TokenLogprob(TopLogprob):
    """A token of the answer, how likely it was, and what was likelier."""

    top_logprobs: tuple[TopLogprob, ...]


class ChatLogprobs(Schema):
    """The tokens of a chat's answer."""

    content: tuple[TokenLogprob, ...]


class CompletionLogprobs(Schema):
    """The tokens of a text, position by position."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    """null where nothing stands before a token."""
    top_logprobs: tuple[dict[str, float] | None, ...]
    text_offset: tuple[int, ...]
    """Where a token starts in the text, in characters."""


class AnswerMessage(Schema):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Schema):
    """One of the `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str


class ChatCompletion(Schema):
    """A conversation's next turn."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage


class CompletionChoice(Schema):
    """One of the `n` continuations of a prompt; those of the first prompt come first."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str


class Completion(Schema):
    """Continuations of texts."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage


class HostedModel(Schema):
    """A model that can be asked for completions."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "abq"
    artifact_id: str

    @classmethod
    def of(cls, deployment: Deployment) -> Self:
        """Show a deployment as a model."""
        return cls(
            id=deployment.name,
            created=int(deployment.created_at.timestamp()),
            artifact_id=deployment.artifact_id,
        )
