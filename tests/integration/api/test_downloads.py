"""Files of an artifact over HTTP: whole, in pieces, and not at all when the client has them."""

import hashlib
import socket
from base64 import b64encode

import httpx
import pytest

SHARD = "model-00001-of-00001.safetensors"
CONTENT = bytes(range(256)) * 300
SIZE = len(CONTENT)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def shard(shared_api):
    """A client and the address of a file of 76 800 bytes."""
    _, artifact_id = shared_api.artifact(files={SHARD: CONTENT, "empty.txt": b""})
    with shared_api.client("artifacts:read") as client:
        yield client, f"/v1/artifacts/{artifact_id}/files/{SHARD}"


def test_the_manifest_leads_to_every_file_and_its_digest(api):
    job_id, artifact_id = api.artifact()

    with api.client() as client:
        manifest = client.get(f"/v1/quantizations/{job_id}/artifacts").json()
        contents = {each["path"]: client.get(each["url"]).content for each in manifest["files"]}

    assert manifest["id"] == artifact_id
    assert {each["path"] for each in manifest["files"]} == set(contents) != set()
    for each in manifest["files"]:
        assert hashlib.sha256(contents[each["path"]]).hexdigest() == each["sha256"]
        assert len(contents[each["path"]]) == each["bytes"]


def test_a_whole_file_comes_with_what_is_needed_to_check_and_keep_it(shard):
    client, url = shard

    response = client.get(url)

    assert response.status_code == 200
    assert response.content == CONTENT
    assert response.headers["etag"] == f'"sha256-{SHA256}"'
    digest = b64encode(bytes.fromhex(SHA256)).decode()
    assert response.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-length"] == str(SIZE)
    assert response.headers["content-disposition"] == f"attachment; filename*=UTF-8''{SHARD}"
    assert "immutable" in response.headers["cache-control"]


def test_a_download_that_broke_off_is_resumed_to_the_same_sha256(shard):
    client, url = shard

    broken = _read_and_hang_up(client, url, at_least=10_000)
    rest = client.get(
        url, headers={"Range": f"bytes={len(broken)}-", "If-Range": f'"sha256-{SHA256}"'}
    )

    assert 0 < len(broken) < SIZE
    assert rest.status_code == 206
    assert rest.headers["content-range"] == f"bytes {len(broken)}-{SIZE - 1}/{SIZE}"
    assert hashlib.sha256(broken + rest.content).hexdigest() == SHA256
    # the digest is of the whole file also when a part of it is sent
    assert rest.headers["repr-digest"] == client.get(url).headers["repr-digest"]


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=-5", SIZE - 5, SIZE),
        (f"bytes=0-{SIZE + 10}", 0, SIZE),
        (f"bytes=-{SIZE + 10}", 0, SIZE),
        ("Bytes=10-19", 10, 20),
    ],
)
def test_a_range_is_exactly_its_bytes(shard, wanted, start, end):
    client, url = shard

    response = client.get(url, headers={"Range": wanted})

    assert response.status_code == 206
    assert response.content == CONTENT[start:end]
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"


@pytest.mark.parametrize("wanted", [f"bytes={SIZE}-", f"bytes={SIZE + 5}-{SIZE + 9}", "bytes=-0"])
def test_a_range_outside_of_the_file_is_416_with_its_size(shard, wanted):
    client, url = shard

    response = client.get(url, headers={"Range": wanted})

    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{SIZE}"
    assert response.json()["code"] == "range_not_satisfiable"


@pytest.mark.parametrize(
    "wanted", ["bytes=", "bytes=-", "lines=0-3", "bytes=9-3", "bytes=a-b", f"bytes={'9' * 5000}-"]
)
def test_a_malformed_range_is_answered_with_the_whole_file(shard, wanted):
    client, url = shard

    response = client.get(url, headers={"Range": wanted})

    assert response.status_code == 200
    assert response.content == CONTENT


@pytest.mark.parametrize(
    "condition", ['"sha256-other"', f'W/"sha256-{SHA256}"', "Sun, 22 Nov 2026 03:42:03 GMT"]
)
def test_another_version_is_sent_whole_instead_of_in_part(shard, condition):
    client, url = shard

    response = client.get(url, headers={"Range": "bytes=10-19", "If-Range": condition})

    assert response.status_code == 200
    assert response.content == CONTENT


@pytest.mark.parametrize(
    "tags", [f'"sha256-{SHA256}"', f'W/"sha256-{SHA256}"', f'"x", "sha256-{SHA256}"', "*"]
)
def test_a_client_that_has_the_file_gets_304_and_no_bytes(shard, tags):
    client, url = shard

    response = client.get(url, headers={"If-None-Match": tags, "Range": f"bytes={SIZE}-"})

    assert response.status_code == 304
    assert response.content == b""
    assert response.headers["etag"] == f'"sha256-{SHA256}"'


def test_head_tells_the_size_and_digest_of_the_whole_file_without_its_bytes(shard):
    client, url = shard

    head = client.head(url, headers={"Range": "bytes=10-19"})

    assert head.status_code == 200
    assert head.content == b""
    whole = client.get(url).headers
    for name in ("content-length", "etag", "repr-digest", "content-type"):
        assert head.headers[name] == whole[name]


def test_a_disk_that_fails_in_the_middle_cuts_the_connection(shard, monkeypatch):
    client, url = shard

    def read(_):
        yield CONTENT[:1000]
        raise OSError("input/output error")

    monkeypatch.setattr("api.services.artifacts.Download.read", read)

    # a file that ended early without a sign would be taken for complete
    with pytest.raises(httpx.RemoteProtocolError):
        client.get(url)


def test_an_empty_file_is_no_fault(shard):
    client, url = shard

    response = client.get(url.replace(SHARD, "empty.txt"))

    assert (response.status_code, response.content) == (200, b"")


def test_a_path_that_the_artifact_does_not_list_leads_nowhere(api):
    _, artifact_id = api.artifact()
    paths = ["nothing.txt", "..%2Fabq.db", "%2e%2e/%2e%2e/abq.db", "%2Fetc%2Fpasswd"]

    with api.client() as client:
        answers = [client.get(f"/v1/artifacts/{artifact_id}/files/{path}") for path in paths]

    assert [each.status_code for each in answers] == [404] * len(paths)


def test_text_that_a_database_cannot_hold_is_the_callers_fault(api):
    _, artifact_id = api.artifact()

    with api.client() as client:
        response = client.get(f"/v1/artifacts/{artifact_id}/files/config.json%00")

    # SQLite can hold it, and has no such file
    assert response.status_code in {404, 422}
    assert response.json()["code"] in {"file_not_found", "invalid_request"}


def _read_and_hang_up(client, url, at_least):
    """Read some bytes of a file from a bare socket, and close it in the middle."""
    host, port = client.base_url.host, client.base_url.port
    request = (
        f"GET {url} HTTP/1.1\r\nHost: {host}\r\n"
        f"Authorization: {client.headers['authorization']}\r\n\r\n"
    )
    with socket.create_connection((host, port)) as connection:
        connection.sendall(request.encode())
        received = b""
        while len(received) < at_least:
            received += connection.recv(4096)
    return received.split(b"\r\n\r\n", 1)[1]
