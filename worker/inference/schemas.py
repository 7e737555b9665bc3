"""What the API process sends to the inference process."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.inference.engine import InferenceEngine
from engine.inference.request import GenerationRequest

__all__ = ["GenerateBody", "MessageBody"]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MessageBody(_Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class GenerateBody(_Body):
    """One generation; the ranges are the engine's, checked where they are defined."""

    artifact_id: str = Field(max_length=64)
    prompt: str | None = None
    messages: tuple[MessageBody, ...] | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _check_one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, and not both")
        return self

    def to_request(self, engine: InferenceEngine) -> GenerationRequest:
        """Turn text into the ids of a model.

        Raises:
            RequestInvalid: naming the field.
        """
        if self.messages is not None:
            ids = engine.text.encode_chat([each.model_dump() for each in self.messages])
        else:
            ids = engine.text.encode(self.prompt or "")
        return GenerationRequest(
            prompt_ids=ids,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            seed=self.seed,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
        )
