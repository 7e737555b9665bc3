"""Whether the service can do its work, the numbers of its jobs, and what its errors mean."""

from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import ClassVar

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from typing_extensions import override

from api.db.connection import Database
from api.db.repositories.jobs import count_by_status
from api.db.repositories.positions import oldest_queued_age_s
from api.errors import ServiceError
from api.schemas.health import ErrorMeaning, Readiness
from api.services.inference import InferenceClient

__all__ = ["JobCollector", "ProblemUnknown", "check_readiness", "explain_problem"]

OK = "ok"


class ProblemUnknown(ServiceError):
    """No such error code."""

    code: ClassVar[str] = "problem_not_found"
    status: ClassVar[int] = 404


def check_readiness(
    database: Database, inference: InferenceClient, *, is_stopping: bool
) -> Readiness:
    """Ask the parts that requests need; a missing inference service stops no job."""
    checks = {"database": _check_database(database), "inference": _check_inference(inference)}
    if is_stopping:
        checks["process"] = "is about to stop"
    is_ready = checks["database"] == OK and not is_stopping
    return Readiness(status="ready" if is_ready else "not_ready", checks=checks)


def explain_problem(code: str) -> ErrorMeaning:
    """Read what an error code means.

    Raises:
        ProblemUnknown: there is no such code.
    """
    for kind in _subclasses(ServiceError):
        if kind.code == code:
            meaning = " ".join((kind.__doc__ or "").split())
            return ErrorMeaning(code=code, status=kind.status, meaning=meaning)
    for status in HTTPStatus:
        if code == status.phrase.lower().replace(" ", "_"):
            meaning = status.description or status.phrase
            return ErrorMeaning(code=code, status=status, meaning=meaning)
    raise ProblemUnknown


class JobCollector(Collector):
    """Reads the jobs table whenever metrics are asked for; truer than counters in a process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @override
    def collect(self) -> Iterable[Metric]:
        """Count jobs by status and tell how long the oldest queued one waits."""
        with self._database.read() as session:
            counts = count_by_status(session)
            age_s = oldest_queued_age_s(session)
        jobs = GaugeMetricFamily("abq_jobs", "Jobs by status.", labels=["status"])
        for status, count in counts.items():
            jobs.add_metric([status], count)
        yield jobs
        yield GaugeMetricFamily(
            "abq_oldest_queued_job_seconds", "Age of the oldest queued job.", value=age_s
        )

    def describe(self) -> Iterable[Metric]:
        """Nothing: else the registry would ask the database as soon as it is made."""
        return ()


def _check_database(database: Database) -> str:
    try:
        with database.read() as session:
            session.execute(text("SELECT count(*) FROM tenants"))
    except SQLAlchemyError:
        return "does not answer, or is not migrated"
    return OK


def _check_inference(inference: InferenceClient) -> str:
    try:
        inference.list_models()
    except ServiceError as error:
        return error.message
    return OK


def _subclasses(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _subclasses(each)
