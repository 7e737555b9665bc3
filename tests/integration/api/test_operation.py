"""What operators and proxies see: probes, metrics, request ids, and faults of every kind."""

import httpx
import pytest

from api.db.connection import Database
from api.settings import InferenceSettings, Settings
from tests.running_api import run_api
from tests.servers import free_port


@pytest.fixture
def anyone(shared_api):
    """A client without a key."""
    with httpx.Client(base_url=shared_api.url, trust_env=False) as client:
        yield client


def test_probes_answer_without_a_key(anyone):
    ready = anyone.get("/readyz")

    assert anyone.get("/healthz").json() == anyone.get("/health").json() == {"status": "ok"}
    # jobs run without the inference service, so its absence is told and nothing more
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert ready.json()["checks"]["database"] == "ok"
    assert ready.json()["checks"]["inference"] != "ok"


def test_a_database_without_tables_is_not_ready(tmp_path):
    inference = InferenceSettings(url=f"http://127.0.0.1:{free_port()}")
    settings = Settings(data_dir=tmp_path, inference=inference)
    database = Database(settings.database_url)

    with run_api(settings, database) as api:
        ready = httpx.get(f"{api.url}/readyz", trust_env=False)
        healthy = httpx.get(f"{api.url}/healthz", trust_env=False)
    database.close()

    assert (ready.status_code, ready.json()["status"]) == (503, "not_ready")
    assert healthy.status_code == 200


def test_metrics_count_jobs_from_their_table_and_requests_by_route(api):
    job = api.queue_job()
    api.queue_job()
    api.claim()

    with api.client() as client:
        client.get(f"/v1/quantizations/{job.id}")
        client.get("/nowhere")
        text = client.get("/metrics").text

    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert samples['abq_jobs{status="running"}'] == "1.0"
    assert samples['abq_jobs{status="queued"}'] == "1.0"
    assert samples['abq_jobs{status="failed"}'] == "0.0"
    assert 0 < float(samples["abq_oldest_queued_job_seconds"]) < 60
    count = "abq_http_request_duration_seconds_count"
    assert (
        samples[f'{count}{{method="GET",route="/v1/quantizations/{{job_id}}",status="200"}}']
        == "1.0"
    )
    # an id or a scanner's path in a label would make a series of every request
    assert job.id not in text
    assert "nowhere" not in text


def test_a_request_id_is_made_or_taken_over(anyone):
    made = anyone.get("/nowhere")
    taken = anyone.get("/nowhere", headers={"X-Request-Id": "trace-1"})
    refused = anyone.get("/nowhere", headers={"X-Request-Id": "x" * 500})

    assert made.json()["request_id"] == made.headers["x-request-id"].strip() != ""
    assert taken.json()["request_id"] == taken.headers["x-request-id"] == "trace-1"
    assert refused.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/artifacts/x", 404, "not_found"),
        ("GET", "/v1/quantizations/", 404, "not_found"),
        ("PUT", "/v1/quantizations", 405, "method_not_allowed"),
        ("GET", "/problems/nonsense", 404, "problem_not_found"),
    ],
)
def test_what_the_framework_refuses_is_a_problem_too(anyone, method, path, status, code):
    response = anyone.request(method, path)

    problem = response.json()
    assert response.status_code == problem["status"] == status
    assert response.headers["content-type"] == "application/problem+json"
    assert (problem["code"], problem["instance"]) == (code, path)
    assert problem["type"].endswith(code)
    if status == 405:
        assert response.headers["allow"]


def test_a_problem_says_where_its_meaning_is_written(anyone):
    for path in ("/nowhere", "/v1/quantizations"):
        problem = anyone.get(path).json()
        meaning = anyone.get(problem["doc_url"]).json()

        assert (meaning["code"], meaning["status"]) == (problem["code"], problem["status"])
        assert len(meaning["meaning"]) > 10


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_beyond_the_limit_is_413_whether_its_size_is_told_or_not(shared_api, is_announced):
    body = b"x" * 300_000
    content = body if is_announced else iter([body[:150_000], body[150_000:]])

    with shared_api.client() as client:
        response = client.post("/v1/quantizations", content=content)

    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b'"w4a8"', b"\xff", b""])
def test_a_body_that_is_no_json_object_is_422(shared_api, body):
    headers = {"Content-Type": "application/json"}

    with shared_api.client() as client:
        response = client.post("/v1/quantizations", content=body, headers=headers)

    assert response.status_code in {400, 422}
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["detail"]


def test_a_fault_is_500_without_internals_and_with_its_request_id(shared_api, monkeypatch):
    def fail(*_):
        raise RuntimeError("the secret path")

    monkeypatch.setattr("api.services.jobs.list_jobs", fail)
    monkeypatch.setattr("api.services.deployments.list_hosted", fail)
    with shared_api.client() as client:
        problem = client.get("/v1/quantizations")
        openai = client.get("/v1/models")

    assert (problem.status_code, problem.json()["code"]) == (500, "internal_error")
    assert problem.json()["request_id"] == problem.headers["x-request-id"]
    assert (openai.status_code, openai.json()["error"]["type"]) == (500, "server_error")
    assert openai.json()["error"]["code"] is None
    assert "secret" not in problem.text + openai.text
