"""From a request to a queued job: look for a replay, check before any weight is read, queue."""

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from api.db.connection import Database
from api.db.repositories.idempotency import RequestKey
from api.db.tables.jobs import Job
from api.hub.base import ModelHub
from api.schemas.quantizations import Estimate, QuantizationRequest
from api.services.jobs import NewJob, create_job, find_replayed_job
from api.services.preflight import Preflight, preflight
from api.settings import Settings

__all__ = ["QuantizationDesk"]

CREATE_PATH = "/v1/quantizations"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationDesk:
    """Takes quantization requests with all that is needed to judge and queue them."""

    database: Database
    hub: ModelHub
    settings: Settings

    def estimate(self, request: QuantizationRequest) -> Estimate:
        """Say what a quantization would need and give; changes nothing.

        Raises:
            ServiceError: what create would refuse it for, naming the field.
        """
        checked = self._check(request)
        return Estimate(
            model=request.model,
            source_sha=checked.resolved.sha,
            notation=request.spec.notation,
            architecture=checked.architecture.model_type,
            **checked.estimate,
        )

    def create(
        self, tenant_id: str, request: QuantizationRequest, idempotency_key: str | None
    ) -> Job:
        """Queue a quantization, or find the one that an equal request has queued.

        Raises:
            IdempotencyMismatch: the key came with another body before.
            QuotaExceeded: the tenant has too many jobs that are not at an end.
            ServiceError: preflight refused it, naming the field.
        """
        key = _request_key(request, idempotency_key) if idempotency_key else None
        replayed = find_replayed_job(self.database, tenant_id, key) if key else None
        if replayed is not None:
            return replayed
        wanted = _new_job(request, self._check(request))
        return create_job(self.database, self.settings, tenant_id, wanted, key)

    def _check(self, request: QuantizationRequest) -> Preflight:
        return preflight(
            self.hub,
            self.settings,
            model=request.model,
            revision=request.revision,
            spec=request.spec,
            publish=_publish(request),
            evaluation=request.evaluation.model_dump(),
        )


def _request_key(request: QuantizationRequest, idempotency_key: str) -> RequestKey:
    # what was understood, not the bytes: the same request written in another order is the same
    body = json.dumps(request.model_dump(mode="json"), sort_keys=True)
    return RequestKey(
        key=idempotency_key,
        method="POST",
        path=CREATE_PATH,
        body_sha256=sha256(body.encode()).hexdigest(),
    )


def _new_job(request: QuantizationRequest, checked: Preflight) -> NewJob:
    return NewJob(
        model=request.model,
        revision=request.revision,
        source_sha=checked.resolved.sha,
        spec=request.spec.to_json(),
        evaluation=request.evaluation.model_dump(),
        publish=_publish(request),
        labels=request.labels,
        estimate=checked.estimate,
        need_vram_bytes=checked.estimate["memory_needed_bytes"],
    )


def _publish(request: QuantizationRequest) -> dict[str, Any] | None:
    return request.publish.model_dump() if request.publish else None
