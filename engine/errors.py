"""What can go wrong in the engine; torch-free, so that the service can translate it.

Every class has a stable `code`; its docstring is the default message.
"""

from typing import ClassVar

__all__ = [
    "CacheExceeded",
    "CalibrationDiverged",
    "CalibrationInterrupted",
    "CheckpointInvalid",
    "ContextLengthExceeded",
    "DatasetUnavailable",
    "DeviceFailed",
    "EngineError",
    "EngineOverloaded",
    "EvaluationUnavailable",
    "GuideFailed",
    "NoTokenDrawn",
    "SpecError",
    "UnsupportedModel",
]


class EngineError(Exception):
    """The engine failed."""

    code: ClassVar[str] = "engine_error"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or type(self).__doc__)

    @property
    def message(self) -> str:
        """The sentence to show."""
        return str(self.args[0])


class SpecError(EngineError, ValueError):
    """The quantization asked for is not possible."""

    code: ClassVar[str] = "invalid_spec"

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field} = {value!r} is not possible: {remedy}")
        self.field = field
        self.value = value
        self.remedy = remedy


class UnsupportedModel(EngineError):
    """The model cannot be quantized."""

    code: ClassVar[str] = "unsupported_model"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class DatasetUnavailable(EngineError):
    """The calibration or evaluation text cannot be used."""

    code: ClassVar[str] = "dataset_unavailable"


class EvaluationUnavailable(EngineError):
    """A part of the evaluation needs something that this machine lacks."""

    code: ClassVar[str] = "evaluation_unavailable"


class CalibrationDiverged(EngineError):
    """A loss or a weight became non-finite."""

    code: ClassVar[str] = "calibration_diverged"

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(f"{layer}: {message}")
        self.layer = layer


class CalibrationInterrupted(EngineError):
    """The calibration was asked to stop; what is finished stays on disk."""

    code: ClassVar[str] = "calibration_interrupted"


class CheckpointInvalid(EngineError):
    """A checkpoint directory does not hold what its manifest promises."""

    code: ClassVar[str] = "checkpoint_invalid"


class DeviceFailed(EngineError):
    """The device failed while the request ran; send it again."""

    code: ClassVar[str] = "device_failed"


class GuideFailed(EngineError):
    """The guide of a running answer cannot be followed any further; make it simpler."""

    code: ClassVar[str] = "guide_failed"


class NoTokenDrawn(EngineError):
    """No token can be drawn: a logit is not finite, or the guide of the answer allows none."""

    code: ClassVar[str] = "no_token_drawn"


class EngineOverloaded(EngineError):
    """As much waits as may; try again later."""

    code: ClassVar[str] = "overloaded"

    def __init__(self, field: str, waiting: int, limit: int) -> None:
        super().__init__(
            f"{waiting} {field} would wait and at most {limit} may; try again in a moment"
        )
        self.field = field
        self.waiting = waiting
        self.limit = limit


class ContextLengthExceeded(EngineError):
    """Prompt and completion do not fit the model's context."""

    code: ClassVar[str] = "context_length_exceeded"

    holder: ClassVar[str] = "the model's context"

    def __init__(self, field: str, tokens: int, limit: int) -> None:
        super().__init__(
            f"{field}: {tokens} tokens are more than {self.holder} of {limit}; shorten the"
            " prompt or lower max_tokens"
        )
        self.field = field
        self.tokens = tokens
        self.limit = limit


class CacheExceeded(ContextLengthExceeded):
    """Prompt and completion do not fit the key-value cache, even alone."""

    holder: ClassVar[str] = "the key-value cache"
