"""The inference services together: models on all of them, each request to the least busy one."""

import itertools
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from api.errors import InferenceUnavailable, ServiceError
from api.services.refusals import error_of_record
from api.services.replica import Batch, Record, Replica
from api.settings import InferenceSettings
from api.telemetry import get_logger

__all__ = ["Batch", "InferenceClient"]

log = get_logger(__name__)

BROKEN_OFF = "The inference service broke off; try again."
STATES = ("ready", "loading", "failed")
"""Of a model that replicas hold differently, the first of these is shown."""
SUMMED = ("memory_bytes", "running", "waiting", "tokens_per_s")


class InferenceClient:
    """Speaks to all inference services; threads and tasks may share it."""

    def __init__(self, settings: InferenceSettings) -> None:
        urls = dict.fromkeys((settings.url, *settings.replica_urls))
        self._replicas = tuple(Replica(url, settings) for url in urls)
        self._turns = itertools.count()

    def load(self, artifact_id: str) -> None:
        """Have an artifact read into memory everywhere; returns before it is there.

        Raises:
            ServiceError: if none of the services takes it.
        """
        self._tell_all("POST", f"/models/{artifact_id}/load")

    def unload(self, artifact_id: str) -> None:
        """Have an artifact dropped from memory everywhere.

        Raises:
            ServiceError: if none of the services does.
        """
        self._tell_all("DELETE", f"/models/{artifact_id}")

    def list_models(self) -> list[Record]:
        """What is in memory, one record a model: what its replicas hold is added up.

        Raises:
            InferenceUnavailable: if none of the services answers.
        """
        held: dict[str, list[Record]] = {}
        for answer in self._tell_all("GET", "/models"):
            for model in answer:
                held.setdefault(model["artifact_id"], []).append(model)
        return [_joined(models) for models in held.values()]

    async def ask(self, path: str, body: Mapping[str, Any], request_id: str) -> Record:
        """Ask any service something that all would answer alike.

        Raises:
            ServiceError: what the service refused the request for.
            InferenceUnavailable: if none of the services answers.
        """
        failure: ServiceError = InferenceUnavailable()
        for replica in self._least_busy_first():
            try:
                return await replica.ask(path, body, request_id)
            except InferenceUnavailable as error:
                failure = error
        raise failure

    async def generate(self, body: Mapping[str, Any], request_id: str) -> AsyncGenerator[Batch]:
        """Yield the records of one generation up to its end; closing the generator cancels it.

        A service that is full, stopping or gone passes the request to the next one, as long as no
        token is out: what comes later is not begun again, for it might come out differently.

        Raises:
            ServiceError: what the service refused the request for, or failed at.
            InferenceUnavailable: no service answers, or one broke off behind the first token.
        """
        failure: ServiceError | None = None
        progress = _Progress()
        for replica in self._least_busy_first():
            try:
                async with aclosing(replica.generate(body, request_id)) as batches:
                    async for batch in batches:
                        if news := progress.pass_on(batch):
                            yield news
                        progress.check_failure()
                progress.check_end()
            except InferenceUnavailable as error:
                if progress.has_tokens:
                    raise
                log.warning("replica_failed", code=error.code, message=error.message)
                failure = failure or error
            else:
                return
        raise failure or InferenceUnavailable()

    async def close(self) -> None:
        """Close all connections."""
        for replica in self._replicas:
            await replica.close()

    def _tell_all(self, method: str, path: str) -> list[Any]:
        answers, failure = [], None
        for replica in self._replicas:
            try:
                response = replica.call(method, path)
                answers.append(response.json() if response.content else None)
            except ServiceError as error:
                failure = failure or error
        if failure is not None and not answers:
            raise failure
        return answers

    def _least_busy_first(self) -> Iterator[Replica]:
        """Each service once, chosen when it is asked for; of equals a different one every time."""
        turn, count = next(self._turns), len(self._replicas)
        left = [self._replicas[(turn + place) % count] for place in range(count)]
        while left:
            chosen = min(left, key=lambda each: (each.is_resting, each.load))
            left.remove(chosen)
            yield chosen


class _Progress:
    """How far a generation is, whichever service goes on with it."""

    def __init__(self) -> None:
        self.has_tokens = False
        self._has_started = False
        self._has_ended = False
        self._failure: ServiceError | None = None

    def pass_on(self, batch: Batch) -> Batch:
        """What of the records is new to the caller."""
        news: Batch = []
        for record in batch:
            match record["type"]:
                case "error":
                    self._failure = error_of_record(record)
                    break
                case "start":
                    if not self._has_started:
                        news.append(record)
                    self._has_started = True
                case kind:
                    self.has_tokens |= kind in {"token", "finish"}
                    self._has_ended |= kind == "end"
                    news.append(record)
        return news

    def check_failure(self) -> None:
        """Raise what the service failed at."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def check_end(self) -> None:
        """Refuse to take for whole what has no end."""
        if not self._has_ended:
            raise InferenceUnavailable(BROKEN_OFF)


def _joined(models: list[Record]) -> Record:
    """What several replicas say of one model."""
    best = min(models, key=lambda each: STATES.index(each["status"]))
    sums = {name: sum(each.get(name) or 0 for each in models) for name in SUMMED}
    ready = sum(each["status"] == STATES[0] for each in models)
    return {**best, **sums, "replicas": ready}
