"""The whole HTTP interface: every router, and the OpenAPI document that describes them."""

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from typing_extensions import override

from api.problems import is_openai_path
from api.routes import artifacts, completions, deployments, events, health, keys, quantizations
from api.schemas.base import OpenAIError, Problem

__all__ = ["Interface"]

VERSION = "1.0.0"
"""Of what is served below `/v1`, not of the package."""
ROUTERS = (
    quantizations.router,
    events.router,
    artifacts.router,
    deployments.router,
    completions.router,
    keys.router,
    health.router,
)
ERRORS = "4XX"


class Interface(FastAPI):
    """The routes, without anything behind them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            title="ABQ Service",
            version=VERSION,
            description="Quantize a language model to any bit width; watch, download and chat.",
            generate_unique_id_function=_operation_id,
            # a redirect would lose the body or the key of some clients; a wrong path is 404
            redirect_slashes=False,
            **options,
        )
        for router in ROUTERS:
            is_openai = router is completions.router
            model = OpenAIError if is_openai else Problem
            refused = {"model": model, "description": "Refused; the body says why."}
            self.include_router(router, responses={ERRORS: refused})

    @override
    def openapi(self) -> dict[str, Any]:
        """Describe the interface; problems have a media type of their own."""
        if self.openapi_schema is None:
            for path, operations in super().openapi()["paths"].items():
                for operation in operations.values():
                    if not is_openai_path(path):
                        _use_problem_type(operation["responses"][ERRORS])
        return super().openapi()


def _use_problem_type(response: dict[str, Any]) -> None:
    content = response["content"]
    content["application/problem+json"] = content.pop("application/json")


def _operation_id(route: APIRoute) -> str:
    return route.name
