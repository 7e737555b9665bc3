"""`/healthz`, `/readyz` and `/metrics` for those who operate the service; and what errors mean."""

from fastapi import APIRouter, Response

from api.deps import PortsDep
from api.schemas.health import ErrorMeaning, Health, Readiness
from api.services import health

__all__ = ["router"]

router = APIRouter(tags=["operation"])

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/healthz")
def check_health() -> Health:
    """Say that the process is alive; asks nobody else."""
    return Health()


@router.get("/health")
def check_health_for_benchmarks() -> Health:
    """Say the same under vLLM's name, which load generators ask for before they begin."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness}})
def check_readiness(response: Response, ports: PortsDep) -> Readiness:
    """Say whether requests can be served: the database answers and the process is to go on."""
    readiness = health.check_readiness(
        ports.database, ports.inference, is_stopping=ports.limits.is_stopping
    )
    response.status_code = 200 if readiness.is_ready else 503
    return readiness


@router.get("/metrics", response_class=Response)
def read_metrics(ports: PortsDep) -> Response:
    """Metrics in Prometheus' text format, those of jobs read from the jobs table."""
    return Response(ports.metrics.render(), media_type=PROMETHEUS_TEXT)


@router.get("/problems/{code}")
def explain_problem(code: str) -> ErrorMeaning:
    """Say what an error code means; `doc_url` of a problem leads here."""
    return health.explain_problem(code)
