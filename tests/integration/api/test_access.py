"""Who gets in: every route of the app, without a key, without the scope, and with a foreign key."""

import re

import httpx
import pytest
from fastapi.routing import iter_route_contexts

from api.app import create_app
from api.auth import new_key
from api.schemas.keys import Scope
from api.settings import Settings

PUBLIC = {"/health", "/healthz", "/readyz", "/metrics", "/problems/{code}"}
DOCUMENTS = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
OPENAI = (
    "/v1/chat/completions", "/v1/completions", "/v1/detokenize", "/v1/models", "/v1/tokenize"
)  # fmt: skip


def list_routes():
    app = create_app(Settings(), database=None, store=None, hub=None, celery=None, inference=None)
    contexts = list(iter_route_contexts(app.routes))
    routes = {(method, each.path) for each in contexts for method in each.methods}
    return sorted((method, path) for method, path in routes if path not in DOCUMENTS | PUBLIC)


ROUTES = list_routes()
every_route = pytest.mark.parametrize(
    ("method", "path"), ROUTES, ids=[f"{method} {path}" for method, path in ROUTES]
)


class Owned:
    """Something of everything that a tenant can own, and requests that name it."""

    def __init__(self, api):
        self.job_id, self.artifact_id = api.artifact()
        with api.client() as client:
            wanted = {"artifact_id": self.artifact_id, "name": "hosted"}
            self.deployment_id = client.post("/v1/deployments", json=wanted).json()["id"]
            wanted = {"name": "mine", "scopes": ["quant:read"]}
            self.key_id = client.post("/v1/api_keys", json=wanted).json()["id"]

    def request(self, method, path):
        # a parameter or a body that is not listed here is a new route: say what it names
        values = {
            "job_id": self.job_id,
            "artifact_id": self.artifact_id,
            "path": "config.json",
            "deployment_id": self.deployment_id,
            "model": "hosted",
            "key_id": self.key_id,
        }
        quantization = {"model": "acme/tiny", "spec": "w4a8"}
        bodies = {
            "/v1/quantizations": quantization,
            "/v1/quantizations/estimate": quantization,
            "/v1/quantizations/{job_id}/cancel": None,
            "/v1/quantizations/{job_id}/retry": None,
            "/v1/deployments": {"artifact_id": self.artifact_id, "name": "again"},
            "/v1/deployments/{deployment_id}/load": None,
            "/v1/deployments/{deployment_id}/unload": None,
            "/v1/tokenize": {"model": "hosted", "prompt": "hi"},
            "/v1/detokenize": {"model": "hosted", "tokens": [1]},
            "/v1/chat/completions": {
                "model": "hosted",
                "messages": [{"role": "user", "content": "hi"}],
            },
            "/v1/completions": {"model": "hosted", "prompt": "hi"},
            "/v1/api_keys": {"name": "k", "scopes": ["keys:admin"]},
        }
        url = re.sub(r"\{(\w+)(?::\w+)?\}", lambda match: values[match[1]], path)
        return httpx.Request(method, url, json=bodies[path] if method == "POST" else None)

    @property
    def ids(self):
        return (self.job_id, self.artifact_id, self.deployment_id, self.key_id)


@pytest.fixture(scope="module")
def shared(shared_api):
    return shared_api, Owned(shared_api)


def send(client, request):
    url = client.base_url.join(request.url)
    return client.request(request.method, url, content=request.content, headers=request.headers)


def error_code(response, path):
    body = response.json()
    if path.startswith(OPENAI):
        assert set(body) == {"error"}
        return body["error"]["code"]
    assert response.headers["content-type"] == "application/problem+json"
    assert body["request_id"] == response.headers["x-request-id"]
    return body["code"]


def test_the_walk_covers_the_whole_interface():
    assert len(ROUTES) >= 20
    assert ("GET", "/v1/quantizations/{job_id}") in ROUTES


@every_route
def test_a_route_without_a_key_answers_401(shared, method, path):
    api, owned = shared

    with httpx.Client(base_url=api.url, trust_env=False) as client:
        response = send(client, owned.request(method, path))

    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    if method != "HEAD":
        assert error_code(response, path) in {"api_key_missing", "invalid_api_key"}


@every_route
def test_a_route_refuses_a_key_that_was_never_issued(shared, method, path):
    api, owned = shared

    headers = {"Authorization": f"Bearer {new_key()}"}
    with httpx.Client(base_url=api.url, headers=headers, trust_env=False) as client:
        response = send(client, owned.request(method, path))

    assert response.status_code == 401
    assert 'error="invalid_token"' in response.headers["www-authenticate"]


@every_route
def test_a_route_opens_to_one_scope_only(shared, method, path):
    api, owned = shared

    opened = []
    for scope in set(Scope) - {Scope.ADMIN}:
        # a stranger's key: with the right scope it gets to the 404 and changes nothing
        with api.client(scope, tenant="stranger") as client:
            response = send(client, owned.request(method, path))
        if response.status_code != 403:
            opened.append(scope)
        elif method != "HEAD":
            assert error_code(response, path) == "scope_missing"

    assert len(opened) == 1


@every_route
def test_a_route_does_not_know_what_another_tenant_owns(shared, method, path):
    api, owned = shared

    with api.client(tenant="stranger") as client:
        response = send(client, owned.request(method, path))

    names_something = "{" in path or path in {"/v1/deployments", *OPENAI[:2]}
    if names_something and (method, path) != ("GET", "/v1/deployments"):
        assert response.status_code == 404
    # the answer may repeat the address that was asked for, and nothing else
    told = response.text.replace(str(response.request.url.path), "")
    assert not any(each in told for each in owned.ids)


@pytest.mark.parametrize("path", [path for method, path in ROUTES if method == "GET"])
def test_the_owner_is_answered_where_the_stranger_is_not(shared, path):
    api, owned = shared

    with api.client() as client:
        response = send(client, owned.request("GET", path))

    assert response.status_code == 200
