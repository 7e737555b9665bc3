"""What the service can refuse or fail at. Each class carries a stable code and an HTTP status.

A class's docstring is its default message; `problems.py` alone turns these into responses.
"""

from typing import Any, ClassVar

__all__ = [
    "ArtifactNotFound", "BodyTooLarge", "ConfigRejected", "ContextTooLong", "DeploymentConflict",
    "DeploymentNotFound", "DiskTooSmall", "FileNotInArtifact", "GuideNotFollowed", "HubUnavailable",
    "IdempotencyConflict", "IdempotencyMismatch", "InferenceDraining", "InferenceOverloaded",
    "InferenceUnavailable", "InvalidRequest", "JobNotFound", "JobStateConflict", "KeyMissing",
    "KeyNotFound", "KeyRejected", "ModelGated", "ModelLoading", "ModelNotFound", "ModelNotHosted",
    "ModelTooLarge", "QuotaExceeded", "RangeNotSatisfiable", "RevisionNotFound", "ScopeMissing",
    "ServiceError", "UnsupportedFormat", "UnsupportedParameter",
]  # fmt: skip


class ServiceError(Exception):
    """The service failed."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500

    def __init__(
        self, message: str | None = None, *, param: str | None = None, **extra: Any
    ) -> None:
        super().__init__(message or type(self).__doc__)
        self.param = param
        """The request field at fault, as a dotted path."""
        self.extra = extra
        """Further members of the problem document, for example `retry_after_s`."""

    @property
    def message(self) -> str:
        """The sentence to show."""
        return str(self.args[0])


class InvalidRequest(ServiceError):
    """The request is not valid."""

    code: ClassVar[str] = "invalid_request"
    status: ClassVar[int] = 422


class ConfigRejected(InvalidRequest):
    """The model's config cannot be used."""

    code: ClassVar[str] = "unsupported_model"


class UnsupportedFormat(InvalidRequest):
    """The model has no safetensors weights; convert it and push them first."""

    code: ClassVar[str] = "unsupported_format"


class ModelTooLarge(InvalidRequest):
    """The model is larger than this service takes."""

    code: ClassVar[str] = "model_too_large"


class DiskTooSmall(InvalidRequest):
    """The disk has no room for source, checkpoints and result."""

    code: ClassVar[str] = "disk_too_small"


class ModelNotFound(InvalidRequest):
    """No such model repository, or it is private."""

    code: ClassVar[str] = "model_not_found"


class RevisionNotFound(InvalidRequest):
    """The model repository has no such revision."""

    code: ClassVar[str] = "revision_not_found"


class ModelGated(ServiceError):
    """The model is gated; accept its terms and configure a Hub token with access."""

    code: ClassVar[str] = "model_gated"
    status: ClassVar[int] = 403


class HubUnavailable(ServiceError):
    """The Hub did not answer; try again."""

    code: ClassVar[str] = "hub_unavailable"
    status: ClassVar[int] = 503


class JobNotFound(ServiceError):
    """No such quantization."""

    code: ClassVar[str] = "quantization_not_found"
    status: ClassVar[int] = 404


class ArtifactNotFound(ServiceError):
    """No such artifact."""

    code: ClassVar[str] = "artifact_not_found"
    status: ClassVar[int] = 404


class FileNotInArtifact(ServiceError):
    """The artifact has no such file."""

    code: ClassVar[str] = "file_not_found"
    status: ClassVar[int] = 404


class DeploymentNotFound(ServiceError):
    """No such deployment."""

    code: ClassVar[str] = "deployment_not_found"
    status: ClassVar[int] = 404


class KeyNotFound(ServiceError):
    """No such API key."""

    code: ClassVar[str] = "api_key_not_found"
    status: ClassVar[int] = 404


class JobStateConflict(ServiceError):
    """The quantization is not in a state that allows this."""

    code: ClassVar[str] = "state_conflict"
    status: ClassVar[int] = 409


class DeploymentConflict(ServiceError):
    """A deployment of that name exists; choose another name or delete it."""

    code: ClassVar[str] = "deployment_conflict"
    status: ClassVar[int] = 409


class IdempotencyConflict(ServiceError):
    """A request with this Idempotency-Key is still in progress."""

    code: ClassVar[str] = "idempotency_conflict"
    status: ClassVar[int] = 409


class IdempotencyMismatch(InvalidRequest):
    """This Idempotency-Key was used with another request body."""

    code: ClassVar[str] = "idempotency_mismatch"


class KeyMissing(ServiceError):
    """No API key; send `Authorization: Bearer abq_live_...`."""

    code: ClassVar[str] = "api_key_missing"
    status: ClassVar[int] = 401


class KeyRejected(ServiceError):
    """The API key is unknown, expired or revoked."""

    code: ClassVar[str] = "invalid_api_key"
    status: ClassVar[int] = 401


class ScopeMissing(ServiceError):
    """The API key lacks a scope."""

    code: ClassVar[str] = "scope_missing"
    status: ClassVar[int] = 403


class QuotaExceeded(ServiceError):
    """Too many queued or running quantizations; wait for one to end."""

    code: ClassVar[str] = "quota_exceeded"
    status: ClassVar[int] = 429


class BodyTooLarge(ServiceError):
    """The request body is too large."""

    code: ClassVar[str] = "body_too_large"
    status: ClassVar[int] = 413


class InferenceUnavailable(ServiceError):
    """The inference service does not answer; try again."""

    code: ClassVar[str] = "inference_unavailable"
    status: ClassVar[int] = 503


class InferenceOverloaded(InferenceUnavailable):
    """The inference service has as many requests as it takes; try again."""

    code: ClassVar[str] = "overloaded"


class ModelLoading(InferenceUnavailable):
    """The model is being loaded; try again."""

    code: ClassVar[str] = "model_loading"


class InferenceDraining(InferenceUnavailable):
    """The inference service is shutting down; try again."""

    code: ClassVar[str] = "draining"


class ModelNotHosted(ServiceError):
    """No such model is hosted here; see `/v1/models`."""

    code: ClassVar[str] = "model_not_found"
    status: ClassVar[int] = 404


class ContextTooLong(ServiceError):
    """Prompt and tokens to generate do not fit into the model's context."""

    code: ClassVar[str] = "context_length_exceeded"
    status: ClassVar[int] = 400


class GuideNotFollowed(InvalidRequest):
    """The language that the answer is to stay in takes too much work; make it simpler."""

    code: ClassVar[str] = "guide_failed"


class UnsupportedParameter(ServiceError):
    """The request has a field that is not supported."""

    code: ClassVar[str] = "unsupported_parameter"
    status: ClassVar[int] = 400


class RangeNotSatisfiable(ServiceError):
    """The file has no such bytes."""

    code: ClassVar[str] = "range_not_satisfiable"
    status: ClassVar[int] = 416
