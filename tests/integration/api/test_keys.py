"""API keys over HTTP, and the first one."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from api.services.keys import create_first_key
from tests.concurrency import run_at_once

URL = "/v1/api_keys"


def test_a_key_is_shown_once_works_and_is_stored_as_a_hash(api):
    with api.client("keys:admin", "quant:read") as client:
        made = client.post(URL, json={"name": "ci", "scopes": ["quant:read"]})
        listed = client.get(URL)
        headers = {"Authorization": f"Bearer {made.json()['key']}"}
        used = client.get("/v1/quantizations", headers=headers)

    key = made.json()["key"]
    assert (made.status_code, used.status_code) == (201, 200)
    assert key.startswith(made.json()["prefix"])
    assert "key" not in listed.json()["data"][0]
    with api.database.read() as session:
        rows = session.execute(text("SELECT * FROM api_keys")).all()
    assert key not in str(rows)


def test_a_revoked_key_opens_nothing_from_the_next_request_on(api):
    with api.client() as client:
        made = client.post(URL, json={"name": "ci", "scopes": ["quant:read"]}).json()
        headers = {"Authorization": f"Bearer {made['key']}"}
        before = client.get("/v1/quantizations", headers=headers)
        gone = client.delete(f"{URL}/{made['id']}")
        after = client.get("/v1/quantizations", headers=headers)
        listed = client.get(URL).json()["data"]

    assert (before.status_code, gone.status_code, after.status_code) == (200, 200, 401)
    assert after.json()["code"] == "invalid_api_key"
    assert next(each for each in listed if each["id"] == made["id"])["revoked_at"] is not None


def test_a_key_ends_with_its_time(api):
    soon = datetime.now(UTC) + timedelta(seconds=2)

    with api.client() as client:
        wanted = {"name": "short", "scopes": ["quant:read"], "expires_at": soon.isoformat()}
        made = client.post(URL, json=wanted).json()
        headers = {"Authorization": f"Bearer {made['key']}"}
        statuses = {client.get("/v1/quantizations", headers=headers).status_code}
        while datetime.now(UTC) < soon + timedelta(seconds=0.3):
            statuses.add(client.get("/v1/quantizations", headers=headers).status_code)

    assert statuses == {200, 401}


def test_a_key_cannot_give_what_it_does_not_have(shared_api):
    with shared_api.client("keys:admin") as client:
        response = client.post(URL, json={"name": "more", "scopes": ["keys:admin", "admin"]})

    assert (response.status_code, response.json()["code"]) == (403, "scope_missing")
    assert "admin" in response.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["everything"]}, "scopes.0"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2099-01-01T00:00:00"}, "expires_at"),
        ({"tenant_id": "tenant_other"}, "tenant_id"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused(shared_api, fields, param):
    with shared_api.client() as client:
        response = client.post(URL, json={"name": "k", "scopes": ["quant:read"]} | fields)

    assert (response.status_code, response.json()["param"]) == (422, param)


def test_a_use_is_recorded(api):
    with api.client() as client:
        client.get(URL)
        (listed,) = client.get(URL).json()["data"]

    assert listed["last_used_at"] is not None


def test_of_processes_that_start_together_one_makes_the_first_key(database):
    keys = run_at_once(*[lambda: create_first_key(database)] * 4)

    assert len([each for each in keys if each is not None]) == 1
    assert create_first_key(database) is None
