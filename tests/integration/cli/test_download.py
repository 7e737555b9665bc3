import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from api.cli.client import ApiClient
from api.cli.download import download_artifact
from api.db.tables.artifacts import Artifact
from tests.cutting_proxy import run_cutting_proxy

WEIGHTS = bytes(range(256)) * 4096


@pytest.fixture
def job_id(api):
    """A job whose artifact has a real manifest."""
    files = {"config.json": b"{}", "empty.txt": b"", "model-00001-of-00001.safetensors": WEIGHTS}
    listed = [
        {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in files.items()
    ]
    manifest = json.dumps({"files": listed}).encode()
    job_id, artifact_id = api.artifact(files={**files, "abq_manifest.json": manifest})
    with api.database.write() as session:
        artifact = session.get_one(Artifact, artifact_id)
        artifact.manifest_sha256 = hashlib.sha256(manifest).hexdigest()
    return job_id


def weights_in(folder):
    return (folder / "model-00001-of-00001.safetensors").read_bytes()


def test_a_download_is_complete_and_verified(abq, job_id, tmp_path):
    answer = abq("download", job_id, "-o", tmp_path / "model", "--json")

    assert answer.code == 0
    assert answer.json["verified"] is True
    assert weights_in(tmp_path / "model") == WEIGHTS
    assert (tmp_path / "model/empty.txt").read_bytes() == b""
    assert not list((tmp_path / "model").glob(".*.part"))


def test_a_second_download_fetches_no_file_again(api, run, job_id, tmp_path):
    with run_cutting_proxy(api.url) as proxy:
        command = ("--url", proxy.url, "--key", api.key(), "download", job_id, "-o", tmp_path)
        run(*command)
        fetched = len(proxy.requests)
        answer = run(*command)

    assert answer.code == 0
    assert len(proxy.requests) == fetched + 1  # the list of files


def test_a_cut_download_goes_on_where_it_stopped(api, run, job_id, tmp_path):
    with run_cutting_proxy(api.url) as proxy:
        # one connection is kept open for all requests until it is cut
        proxy.cuts[:] = [300_000, 400_000]
        answer = run(
            "--url", proxy.url, "--key", api.key(), "download", job_id, "-o", tmp_path,
            "--parallel", 1,
        )  # fmt: skip

    assert answer.code == 0
    assert weights_in(tmp_path) == WEIGHTS
    assert len(proxy.passed) == 3
    assert sum(proxy.passed) < len(WEIGHTS) + 20_000
    assert b"range: bytes=" in proxy.requests[-1].lower()


def test_a_part_of_a_former_try_is_not_fetched_again(api, run, job_id, tmp_path):
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    part = tmp_path / f".model-00001-of-00001.safetensors.{sha256[:16]}.part"
    part.write_bytes(WEIGHTS[:1_000_000])

    with run_cutting_proxy(api.url) as proxy:
        answer = run("--url", proxy.url, "--key", api.key(), "download", job_id, "-o", tmp_path)

    assert answer.code == 0
    assert weights_in(tmp_path) == WEIGHTS
    assert sum(proxy.passed) < 100_000


def test_a_spoilt_part_is_fetched_once_more(abq, job_id, tmp_path):
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    part = tmp_path / f".model-00001-of-00001.safetensors.{sha256[:16]}.part"
    part.write_bytes(b"\xff" * 1000)

    answer = abq("download", job_id, "-o", tmp_path)

    assert answer.code == 0
    assert weights_in(tmp_path) == WEIGHTS


def test_a_changed_file_is_replaced(abq, job_id, tmp_path):
    abq("download", job_id, "-o", tmp_path)
    (tmp_path / "config.json").write_bytes(b"[]")

    answer = abq("download", job_id, "-o", tmp_path)

    assert answer.code == 0
    assert (tmp_path / "config.json").read_bytes() == b"{}"


def test_two_downloads_into_one_folder_both_end_well(api, job_id, tmp_path):
    # threads, not commands: a captured stdout belongs to one command at a time
    def fetch(_):
        with ApiClient(api.url, api.key()) as client:
            return download_artifact(client, job_id, tmp_path)["id"]

    with ThreadPoolExecutor(2) as pool:
        ids = list(pool.map(fetch, range(2)))

    assert ids[0] == ids[1]
    assert weights_in(tmp_path) == WEIGHTS


def test_a_manifest_with_another_digest_is_refused(abq, api, job_id, tmp_path):
    with api.database.write() as session:
        session.query(Artifact).update({"manifest_sha256": "0" * 64})

    answer = abq("download", job_id, "-o", tmp_path)

    assert answer.code == 1
    assert "not the manifest of this artifact" in answer.err


def test_an_unfinished_job_has_nothing_to_download(abq, api, tmp_path):
    job = api.queue_job()

    answer = abq("download", job.id, "-o", tmp_path)

    assert answer.code == 1
    assert answer.err.startswith("abq: ")
