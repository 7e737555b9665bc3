"""Quantizations over HTTP: what is queued, what is refused and why, and how they are read."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

URL = "/v1/quantizations"
MODEL = "local:models/tiny"


@pytest.fixture
def client(shared_api):
    with shared_api.client() as opened:
        yield opened


@pytest.fixture
def writer(shared_api):
    """A client of a tenant of its own, whose list starts empty."""
    with shared_api.client(tenant=f"tenant-{time.monotonic_ns()}") as opened:
        yield opened


def test_a_quantization_is_accepted_with_its_address_and_its_pinned_revision(client):
    response = client.post(URL, json={"model": MODEL, "spec": "w4a8", "labels": {"team": "a"}})

    job = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"{URL}/{job['id']}"
    assert int(response.headers["retry-after"]) > 0
    assert (job["status"], job["notation"], job["labels"]) == ("queued", "w4a8", {"team": "a"})
    assert len(job["source_sha"]) == 40
    assert job["spec"]["w_bits"] == 4
    assert client.get(response.headers["location"]).json()["id"] == job["id"]


def test_an_estimate_promises_bits_and_changes_nothing(writer):
    response = writer.post(f"{URL}/estimate", json={"model": MODEL, "spec": "w3a16g32"})

    estimate = response.json()
    assert response.status_code == 200
    assert estimate["promised_bits_per_weight"] == pytest.approx(3 + 24 / 32)
    assert estimate["architecture"] == "llama"
    assert estimate["disk_needed_bytes"] > estimate["source_bytes"] > 0
    assert writer.get(URL).json()["data"] == []


def test_a_target_promises_what_it_allows_before_anything_is_measured(writer):
    spec = {"w_bits": 4, "a_bits": 8, "group_size": 32, "target": {"average_bits": 4.1}}

    answer = writer.post(f"{URL}/estimate", json={"model": MODEL, "spec": spec}).json()
    job = writer.post(URL, json={"model": MODEL, "spec": spec}).json()

    assert answer["promised_bits_per_weight"] == pytest.approx(4.1, abs=1e-3)
    assert job["spec"]["target"]["average_bits"] == 4.1
    assert job["spec"]["target"]["w_choices"] == [2, 3, 4, 5, 6, 8]


def test_the_same_key_and_body_give_one_job(writer):
    headers = {"Idempotency-Key": "once"}
    bodies = [
        {"model": MODEL, "spec": {"w_bits": 4, "a_bits": 8}},
        {"spec": {"a_bits": 8, "w_bits": 4}, "model": MODEL, "revision": None},
    ]

    answers = [writer.post(URL, json=body, headers=headers) for body in bodies]

    assert [each.status_code for each in answers] == [202, 202]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    assert len(writer.get(URL).json()["data"]) == 1


def test_the_same_key_with_another_body_is_refused(writer):
    headers = {"Idempotency-Key": "once"}
    writer.post(URL, json={"model": MODEL, "spec": "w4a8"}, headers=headers)

    response = writer.post(URL, json={"model": MODEL, "spec": "w3a8"}, headers=headers)

    assert response.status_code == 422
    assert response.json()["code"] == "idempotency_mismatch"


def test_equal_requests_at_the_same_time_make_one_job(writer):
    request = {"json": {"model": MODEL, "spec": "w4a8"}, "headers": {"Idempotency-Key": "x"}}

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: writer.post(URL, **request), range(6)))

    assert {each.status_code for each in answers} <= {202, 409}
    assert len({each.json()["id"] for each in answers if each.status_code == 202}) == 1
    assert len(writer.get(URL).json()["data"]) == 1


BAD = [
    ({"spec": "w9a8"}, "spec.w_bits", "9", "1 to 8"),
    ({"spec": "w4a8*"}, "spec.a_bits", "8*", "drop the *"),
    ({"spec": "four bits"}, "spec", "four bits", "w<bits>"),
    ({"spec": ["w4a8"]}, "spec", "w4a8", "w4a8"),
    ({"spec": {"w_bits": True}}, "spec.w_bits", "True", "number"),
    ({"spec": {"w_bits": 4, "a_bits": 1}}, "spec.a_bits", "1", "2 to 8 or 16"),
    ({"spec": {"w_bits": 4, "group_size": 48}}, "spec.group_size", "48", "multiple of 32"),
    ({"spec": {"w_bits": 4, "group_size": 96}}, "spec.group_size", "96", "32"),
    ({"spec": {"w_bits": 4, "bits": 3}}, "spec.bits", "3", "correct its name"),
    ({"spec": {"w_bits": 4, "recipe": "magic"}}, "spec.recipe", "magic", "lwc"),
    ({"spec": {"w_bits": 4, "symmetric": "yes"}}, "spec.symmetric", "yes", "true or false"),
    (
        {"spec": {"w_bits": 4, "ingredients": {"rotation": "yes"}}},
        "spec.ingredients.rotation",
        "yes",
        "true or false",
    ),
    (
        {"spec": {"w_bits": 4, "ingredients": {"compensation": 1}}},
        "spec.ingredients.compensation",
        "1",
        "true or false",
    ),
    (
        {"spec": {"w_bits": 4, "ingredients": {"spin": True}}},
        "spec.ingredients.spin",
        "True",
        "correct its name",
    ),
    (
        {"spec": {"w_bits": 4, "ingredients": {"rounding": "up"}}},
        "spec.ingredients.rounding",
        "up",
        "'nearest', 'learned' or 'trained'",
    ),
    (
        {"spec": {"w_bits": 4, "ingredients": {"epochs_factor": True}}},
        "spec.ingredients.epochs_factor",
        "True",
        "a number",
    ),
    (
        {"spec": {"w_bits": 4, "ingredients": ["rotation"]}},
        "spec.ingredients",
        "rotation",
        "a JSON object",
    ),
    (
        {"spec": {"w_bits": 4, "overrides": [{"pattern": "*", "w_bits": True}]}},
        "spec.overrides.0.w_bits",
        "True",
        "a number",
    ),
    (
        {"spec": {"w_bits": 4, "target": {"average_bits": 4, "w_choices": [True]}}},
        "spec.target.w_choices.0",
        "True",
        "a number",
    ),
    ({"spec": {}}, "spec.w_bits", "", "required"),
    (
        {"spec": {"w_bits": 4, "calibration": {"samples": 0}}},
        "spec.calibration.samples",
        "0",
        "1 to 4096",
    ),
    (
        {"spec": {"w_bits": 4, "overrides": [{"pattern": "*", "w_bits": 12}]}},
        "spec.overrides.0.w_bits",
        "12",
        "16",
    ),
    (
        {"spec": {"w_bits": 4, "overrides": [{"pattern": "*", "w_bits": 3}] * 257}},
        "spec.overrides",
        "257",
        "at most 256",
    ),
    (
        {"spec": {"w_bits": 4, "target": {"average_bits": 0.5}}},
        "spec.target.average_bits",
        "0.5",
        "1 to 16",
    ),
    ({"spec": {"w_bits": 4, "target": {}}}, "spec.target", "", "set one of average_bits"),
    (
        {"spec": {"w_bits": 4, "target": {"average_bits": 1.5}}},
        "spec.target.average_bits",
        "1.5",
        "stored bits per weight here",
    ),
    (
        {"spec": {"w_bits": 4, "target": {"max_bytes": 5}}},
        "spec.target.max_bytes",
        "5",
        "bytes here",
    ),
    ({"model": "https://example.org/x"}, "model", "https://example.org/x", "owner/name"),
    ({"model": "local:models/../secret"}, "model", "", ""),
    ({"model": "local:nowhere/tiny"}, "model", "", ""),
    ({"model": "local:models/absent"}, "model", "", ""),
    ({"bits": 4}, "bits", "", "correct its name"),
    ({"evaluation": {"windows": 0}}, "evaluation.windows", "0", "greater than or equal to 1"),
    ({"evaluation": {"datasets": ["wiki"]}}, "evaluation.datasets.0", "wiki", "wikitext2"),
    ({"evaluation": {"datasets": ["local:texts/a"]}}, "evaluation.datasets", "texts/a", "none is"),
    ({"evaluation": {"tasks": ["chess"]}}, "evaluation.tasks.0", "chess", "piqa"),
    (
        {"spec": {"w_bits": 4, "calibration": {"dataset": "wiki"}}},
        "spec.calibration.dataset",
        "wiki",
        "wikitext2, c4, ptb",
    ),
    ({"labels": {"a b": "c"}}, "labels.a b", "a b", ""),
    ({"publish": {"repo_id": "no-owner"}}, "publish.repo_id", "no-owner", ""),
]


@pytest.mark.parametrize(("fields", "param", "value", "remedy"), BAD)
def test_a_bad_request_is_refused_by_field_value_and_remedy(writer, fields, param, value, remedy):
    body = {"model": MODEL, "spec": "w4a8"} | fields

    answers = [writer.post(url, json=body) for url in (URL, f"{URL}/estimate")]

    for response in answers:
        problem = response.json()
        assert response.status_code == 422
        assert response.headers["content-type"] == "application/problem+json"
        assert problem["param"] == param
        assert value in problem["detail"]
        assert remedy in problem["detail"]
    assert writer.get(URL).json()["data"] == []


def test_all_wrong_fields_are_named_at_once(client):
    body = {"model": MODEL, "spec": {"w_bits": "x", "bits": 4}, "evaluation": {"length": 1}}

    problem = client.post(URL, json=body).json()

    named = {each["param"] for each in problem["errors"]}
    assert named == {"spec.w_bits", "spec.bits", "evaluation.length"}
    assert all(each in problem["detail"] for each in named)


def test_a_hub_that_does_not_answer_is_503_and_nothing_is_queued(writer):
    response = writer.post(URL, json={"model": "acme/tiny", "spec": "w4a8"})

    assert response.status_code == 503
    assert response.json()["code"] == "hub_unavailable"
    assert int(response.headers["retry-after"]) > 0
    assert writer.get(URL).json()["data"] == []


def test_a_list_is_read_page_by_page_through_its_links(api):
    made = [api.queue_job(model=f"acme/m{number}").id for number in range(7)]

    seen, url = [], f"{URL}?limit=3"
    with api.client("quant:read") as client:
        while url:
            response = client.get(url)
            page = response.json()
            assert (page["first_id"], page["last_id"]) == (
                page["data"][0]["id"],
                page["data"][-1]["id"],
            )
            seen += [each["id"] for each in page["data"]]
            assert page["has_more"] == ("next" in response.links)
            url = response.links.get("next", {}).get("url")

    assert seen == made[::-1]


def test_a_list_is_narrowed_by_status_model_and_labels(api):
    wanted = api.queue_job(model="acme/a", labels={"team": "red", "stage": "x.y"})
    other = api.queue_job(model="acme/a", labels={"team": "blue"})
    api.queue_job(model="acme/b", labels={"team": "red"})

    with api.client() as client:
        client.post(f"{URL}/{other.id}/cancel")
        by_label = client.get(URL, params={"label.team": "red", "label.stage": "x.y"}).json()
        by_model = client.get(URL, params={"model": "acme/a", "status": "queued"}).json()
        by_status = client.get(URL, params={"status": "cancelled"}).json()

    assert [each["id"] for each in by_label["data"]] == [wanted.id]
    assert [each["id"] for each in by_model["data"]] == [wanted.id]
    assert [each["id"] for each in by_status["data"]] == [other.id]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("stauts=queued", "stauts"),
        ("status=asleep", "status"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("after=job_nothing", "after"),
        ("label.a%22b=c", 'label.a"b'),
    ],
)
def test_a_list_with_a_bad_parameter_is_refused_by_its_name(client, query, param):
    response = client.get(f"{URL}?{query}")

    assert response.status_code == 422
    assert response.json()["param"] == param


def test_an_unchanged_job_is_304_and_a_changed_one_is_not(api):
    job = api.queue_job()

    with api.client() as client:
        first = client.get(f"{URL}/{job.id}")
        headers = {"If-None-Match": first.headers["etag"]}
        unchanged = client.get(f"{URL}/{job.id}", headers=headers)
        api.claim()
        changed = client.get(f"{URL}/{job.id}", headers=headers)

    assert first.headers["etag"].startswith('W/"')
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert unchanged.headers["etag"] == first.headers["etag"]
    assert (changed.status_code, changed.json()["status"]) == (200, "running")
    assert changed.headers["etag"] != first.headers["etag"]


def test_retry_after_comes_until_the_job_has_ended(api):
    job_id, _ = api.artifact()
    running = api.queue_job()

    with api.client() as client:
        assert "retry-after" in client.get(f"{URL}/{running.id}").headers
        assert "retry-after" not in client.get(f"{URL}/{job_id}").headers


def test_prefer_wait_holds_the_answer_until_the_job_ends(api):
    job = api.queue_job()
    lease = api.claim()

    with api.client() as client, ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        waiting = pool.submit(client.get, f"{URL}/{job.id}", headers={"Prefer": "wait=60"})
        time.sleep(0.5)
        assert not waiting.done()
        api.finish(lease)
        response = waiting.result()
        waited_s = time.monotonic() - started

    assert response.json()["status"] == "succeeded"
    assert response.headers["preference-applied"] == "wait=60"
    assert 0.5 <= waited_s < 30


def test_prefer_wait_ends_with_its_time(api):
    job = api.queue_job()

    with api.client() as client:
        started = time.monotonic()
        response = client.get(f"{URL}/{job.id}", headers={"Prefer": "respond-async, wait=1"})

    assert 1 <= time.monotonic() - started < 20
    assert response.json()["status"] == "queued"


def test_cancel_and_retry_lead_back_to_the_queue(api):
    job = api.queue_job()

    with api.client("quant:write") as client:
        cancelled = client.post(f"{URL}/{job.id}/cancel")
        again = client.post(f"{URL}/{job.id}/cancel")
        retried = client.post(f"{URL}/{job.id}/retry")
        refused = client.post(f"{URL}/{job.id}/retry")

    assert [each.json()["status"] for each in (cancelled, again, retried)] == [
        "cancelled", "cancelled", "queued",
    ]  # fmt: skip
    assert (retried.status_code, retried.headers["location"]) == (202, f"{URL}/{job.id}")
    assert (refused.status_code, refused.json()["code"]) == (409, "state_conflict")


def test_layers_show_the_losses_that_the_worker_recorded(api):
    job = api.queue_job()
    lease = api.claim()
    bits = {"self_attn.q_proj": 4}
    api.record(lease, "layer.started", index=0, total=2, name="model.layers.0", bits=bits)
    api.record(
        lease, "layer.finished", index=0, total=2, name="model.layers.0", loss_before=0.5,
        loss_after=0.25, seconds=1.5, memory_bytes=1 << 33, resumed=False,
    )  # fmt: skip

    with api.client() as client:
        layers = client.get(f"{URL}/{job.id}/layers").json()["data"]

    assert [(each["name"], each["loss_before"], each["loss_after"]) for each in layers] == [
        ("model.layers.0", 0.5, 0.25)
    ]
    assert (layers[0]["bits"], layers[0]["memory_bytes"]) == (bits, 1 << 33)


def test_a_job_without_a_result_has_no_artifact_yet(api):
    job = api.queue_job()

    with api.client() as client:
        response = client.get(f"{URL}/{job.id}/artifacts")

    assert (response.status_code, response.json()["code"]) == (404, "artifact_not_found")


def test_too_many_jobs_are_429_with_the_time_to_come_back(api):
    limit = api.settings.limits.active_jobs
    for _ in range(limit - 1):
        api.queue_job()
    job = api.queue_job()

    with api.client() as client:
        client.post(f"{URL}/{job.id}/cancel")
        api.queue_job()
        response = client.post(f"{URL}/{job.id}/retry")

    assert (response.status_code, response.json()["code"]) == (429, "quota_exceeded")
    assert int(response.headers["retry-after"]) > 0
