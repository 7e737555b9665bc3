"""How a result reaches the Hub: at once or not at all, once, with a card, without its token."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import yaml

from api.db.tables.jobs import Job
from api.errors import HubUnavailable, InvalidRequest
from api.hub.routing import create_hub
from api.settings import HubSettings, Settings
from tests.artifact_files import save_artifact
from tests.fake_hub import STRANGER, WRITER, Trouble
from tests.model_files import model_files
from worker.publish import publish_to_hub

# huggingface_hub uploads with an argument that its own HTTP client deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TARGET = "acme/tiny-w3a8"
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
endpoint, token, revision, folder = sys.argv[1:]
snapshot_download(
    "acme/tiny-w3a8", revision=revision, local_dir=folder, endpoint=endpoint, token=token
)
"""


@pytest.fixture
def source(fake_hub):
    card = {"license": "other", "license_name": "tiny-1", "license_link": "https://x.y/LICENSE"}
    return fake_hub.add("acme/tiny", model_files(), card=card)


@pytest.fixture
def job(source):
    target = {"repo_id": TARGET, "private": True}
    return Job(id="job_01", model="acme/tiny", source_sha=source.head, publish=target)


@pytest.fixture
def folder(tmp_path):
    return save_artifact(tmp_path / "out", shards=2)


def make_hub(fake_hub, token=WRITER, patience_s=5.0):
    hub = HubSettings(endpoint=fake_hub.url, token=token)
    return create_hub(Settings(hub=hub), patience_s=patience_s)


@pytest.fixture
def hub(fake_hub):
    return make_hub(fake_hub)


def ignore():
    """Let the push go on."""


def pushed_files(fake_hub, revision):
    files = fake_hub.repositories[TARGET].commits[revision]
    return {path: blob.read(0, blob.size) for path, blob in files.items()}


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


def front_matter(fake_hub, revision):
    card = pushed_files(fake_hub, revision)["README.md"].decode()
    return yaml.safe_load(card.split("---\n")[1]), card


def test_a_job_that_asks_for_no_push_gets_none(hub, fake_hub, job, folder):
    job.publish = None

    assert publish_to_hub(hub, job, folder, ignore) is None
    assert fake_hub.requests == []


def test_everything_appears_in_one_commit_with_the_jobs_tag(hub, fake_hub, job, folder):
    published = publish_to_hub(hub, job, folder, ignore)

    repository = fake_hub.repositories[TARGET]
    assert repository.private
    assert repository.tags == {"job_01": published.revision}
    assert len(repository.commits) == 2
    assert repository.head == published.revision
    files = pushed_files(fake_hub, published.revision)
    assert set(files) == {path.name for path in folder.iterdir()} | {"README.md", ".gitattributes"}
    assert published.to_json() == {
        "repo_id": TARGET,
        "revision": published.revision,
        "url": f"{fake_hub.url}/{TARGET}",
    }


def test_the_pushed_repository_downloads_with_equal_hashes_in_a_fresh_process(
    hub, fake_hub, job, folder, tmp_path
):
    publish_to_hub(hub, job, folder, ignore)

    subprocess.run(
        [sys.executable, "-c", DOWNLOAD, fake_hub.url, WRITER, "job_01", str(tmp_path / "copy")],
        check=True,
        timeout=60,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
    )

    copied = hashes(tmp_path / "copy")
    assert {name: copied[name] for name in hashes(folder)} == hashes(folder)
    manifest = json.loads((tmp_path / "copy" / "abq_manifest.json").read_text())
    assert {each["path"]: each["sha256"] for each in manifest["files"]}.items() <= copied.items()


def test_publishing_twice_changes_nothing(hub, fake_hub, job, folder):
    first = publish_to_hub(hub, job, folder, ignore)
    commits = len(fake_hub.repositories[TARGET].commits)

    assert publish_to_hub(hub, job, folder, ignore) == first
    assert len(fake_hub.repositories[TARGET].commits) == commits


def test_a_worker_lost_before_the_tag_leaves_nothing_twice(hub, fake_hub, job, folder):
    first = publish_to_hub(hub, job, folder, ignore)
    repository = fake_hub.repositories[TARGET]
    repository.tags.clear()

    assert publish_to_hub(hub, job, folder, ignore) == first
    assert repository.tags == {"job_01": first.revision}
    assert len(repository.commits) == 2


def test_a_later_job_replaces_the_shards_of_an_earlier_one(hub, fake_hub, job, folder, tmp_path):
    publish_to_hub(hub, job, folder, ignore)
    job.id = "job_02"

    second = publish_to_hub(hub, job, save_artifact(tmp_path / "next", shards=1), ignore)

    shards = [p for p in pushed_files(fake_hub, second.revision) if p.endswith(".safetensors")]
    assert shards == ["model-00001-of-00001.safetensors"]
    assert set(fake_hub.repositories[TARGET].tags) == {"job_01", "job_02"}


def test_the_card_says_what_the_result_is_and_where_it_came_from(hub, fake_hub, job, folder):
    published = publish_to_hub(hub, job, folder, ignore)

    front, card = front_matter(fake_hub, published.revision)
    assert front["base_model"] == "acme/tiny"
    assert front["base_model_relation"] == "quantized"
    assert (front["license"], front["license_name"]) == ("other", "tiny-1")
    assert front["license_link"] == "https://x.y/LICENSE"
    assert {"abq", "quantized", "abq-w3a8g64"} <= set(front["tags"])
    metrics = front["model-index"][0]["results"][0]["metrics"]
    assert [each["value"] for each in metrics] == [21.5, 20.82]
    for fact in (job.source_sha, "3.3750", "21.500", "20.820", "4096 tokens", "job_01",
                 f"hf download {TARGET} --revision job_01"):  # fmt: skip
        assert fact in card


def test_a_card_without_perplexity_says_so(hub, fake_hub, job, tmp_path):
    folder = save_artifact(tmp_path / "out", perplexity=False)

    front, card = front_matter(fake_hub, publish_to_hub(hub, job, folder, ignore).revision)

    assert "model-index" not in front
    assert "not measured (failed)" in card


def test_a_gate_that_closed_meanwhile_keeps_the_push_private(hub, fake_hub, source, job, folder):
    source.gated = True
    job.publish = {"repo_id": TARGET, "private": False}

    with pytest.raises(InvalidRequest) as refusal:
        publish_to_hub(hub, job, folder, ignore)

    assert refusal.value.param == "publish.private"
    assert TARGET not in fake_hub.repositories


@pytest.mark.parametrize(
    "where",
    ["/api/repos/create", "/refs", "/preupload", "/objects/batch", "/upload/", "/commit/", "/tag/",
     "/validate-yaml"],
)  # fmt: skip
@pytest.mark.parametrize("trouble", [Trouble.DOWN, Trouble.BUSY])
def test_a_hub_that_fails_for_a_while_is_outlasted(hub, fake_hub, job, folder, where, trouble):
    fake_hub.inject(trouble, where, amount=0.1)

    published = publish_to_hub(hub, job, folder, ignore)

    assert fake_hub.repositories[TARGET].tags == {"job_01": published.revision}
    assert len(fake_hub.repositories[TARGET].commits) == 2


def test_a_branch_that_moves_on_meanwhile_is_caught_up_with(hub, fake_hub, job, folder):
    fake_hub.inject(Trouble.MOVED, "/commit/")

    published = publish_to_hub(hub, job, folder, ignore)

    assert fake_hub.repositories[TARGET].head == published.revision


def test_a_branch_that_never_rests_is_given_up(hub, fake_hub, job, folder):
    fake_hub.inject(Trouble.MOVED, "/commit/", times=100)

    with pytest.raises(HubUnavailable, match="keeps changing"):
        publish_to_hub(hub, job, folder, ignore)


def test_a_card_in_the_folder_gives_way_to_the_new_one(hub, fake_hub, job, tmp_path):
    folder = save_artifact(tmp_path / "out", **{"README.md": b"an older card"})

    published = publish_to_hub(hub, job, folder, ignore)

    card = pushed_files(fake_hub, published.revision)["README.md"]
    assert b"an older card" not in card


def test_a_storage_that_refuses_is_reported_as_what_it_is(hub, fake_hub, job, folder):
    fake_hub.inject(Trouble.REFUSED, "/upload/", times=2)

    with pytest.raises(InvalidRequest) as refusal:
        publish_to_hub(hub, job, folder, ignore)

    assert refusal.value.param == "publish.repo_id"


def test_a_hub_that_stays_down_leaves_nothing_visible(fake_hub, job, folder):
    fake_hub.inject(Trouble.DOWN, "/commit/", times=100)

    with pytest.raises(HubUnavailable):
        publish_to_hub(make_hub(fake_hub, patience_s=0.5), job, folder, ignore)

    assert set(pushed_files(fake_hub, fake_hub.repositories[TARGET].head)) == {".gitattributes"}


@pytest.mark.parametrize("stop_after", [0, 3, 8, 13])
def test_a_cancelled_push_leaves_nothing_visible(hub, fake_hub, job, folder, stop_after):
    class Cancelled(Exception):
        pass

    asked = []

    def check():
        asked.append(1)
        if len(asked) > stop_after:
            raise Cancelled

    with pytest.raises(Cancelled):
        publish_to_hub(hub, job, folder, check)

    for repository in (fake_hub.repositories.get(TARGET),):
        assert repository is None or set(repository.commits[repository.head]) == {".gitattributes"}
        assert repository is None or repository.tags == {}


def test_a_token_without_rights_is_refused_by_field(fake_hub, job, folder):
    with pytest.raises(InvalidRequest) as refusal:
        publish_to_hub(make_hub(fake_hub, token=STRANGER), job, folder, ignore)

    assert refusal.value.param == "publish.repo_id"
    assert STRANGER not in refusal.value.message


def test_a_token_that_loses_its_rights_is_refused_by_field(hub, fake_hub, job, folder):
    fake_hub.inject(Trouble.REFUSED, "/commit/")

    with pytest.raises(InvalidRequest) as refusal:
        publish_to_hub(hub, job, folder, ignore)

    assert refusal.value.param == "publish.repo_id"


def test_the_token_goes_to_the_hub_only(hub, fake_hub, job, folder, caplog, capfd):
    caplog.set_level("DEBUG")
    fake_hub.inject(Trouble.DOWN, "/upload/")

    published = publish_to_hub(hub, job, folder, ignore)

    by_storage = {each.authorization for each in fake_hub.requests if "/upload/" in each.path}
    assert by_storage == {None}
    assert WRITER not in caplog.text + "".join(capfd.readouterr())
    pushed = b"".join(pushed_files(fake_hub, published.revision).values())
    assert WRITER.encode() not in pushed
