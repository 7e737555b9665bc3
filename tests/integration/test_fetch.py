"""How a job's source arrives: pinned, verified, resumed, stopped, over a Hub that misbehaves."""

import errno
import os
import time
from pathlib import Path

import pytest

from api.db.tables.jobs import Job
from api.errors import (
    HubUnavailable,
    ModelGated,
    ModelNotFound,
    RevisionNotFound,
    UnsupportedFormat,
)
from api.hub.routing import create_hub
from api.settings import HubSettings, Settings
from tests.fake_hub import WRITER, Trouble
from tests.hub_routes import CHUNK_BYTES
from tests.model_files import model_files
from worker.fetch import fetch_source

WEIGHTS = "model.safetensors"
HEADER_READS = 1
"""Requests for the header, before those for the whole file."""
HEADER_BYTES = 100_000


class Killed(Exception):
    """The download was stopped from outside."""


@pytest.fixture
def repository(fake_hub):
    return fake_hub.add("acme/tiny", model_files())


@pytest.fixture
def job(repository):
    return Job(model="acme/tiny", source_sha=repository.head)


def make_hub(fake_hub, *, token=None, patience_s=10.0, **roots):
    hub = HubSettings(endpoint=fake_hub.url, token=token, model_roots=roots)
    return create_hub(Settings(hub=hub), patience_s=patience_s)


@pytest.fixture
def hub(fake_hub):
    return make_hub(fake_hub)


def ignore(done, total):
    """Take progress and do nothing."""


def weight_reads(fake_hub):
    return [each for each in fake_hub.requests if each.path.endswith(WEIGHTS)]


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected():
    names = ("LICENSE", "config.json", "generation_config.json", WEIGHTS, "tokenizer.json",
             "tokenizer_config.json")  # fmt: skip
    return {name: model_files()[name] for name in names}


def test_the_accepted_commit_is_fetched_though_the_branch_moved_on(hub, repository, job, tmp_path):
    repository.commit(model_files(config__json=b"{}"))

    fetch_source(hub, job, tmp_path / "source", ignore)

    assert read_all(tmp_path / "source") == expected()


def test_a_deleted_commit_is_not_replaced_by_another(hub, repository, job, tmp_path):
    old = repository.head
    repository.commit(model_files())
    del repository.commits[old]

    with pytest.raises(RevisionNotFound):
        fetch_source(hub, job, tmp_path / "source", ignore)


@pytest.mark.parametrize(
    ("trouble", "amount"),
    [(Trouble.TRUNCATED, 300_000), (Trouble.DOWN, 0), (Trouble.BUSY, 0.2), (Trouble.WRONG_ETAG, 0),
     (Trouble.NO_RANGE, 0)],
)  # fmt: skip
def test_a_hub_that_fails_for_a_while_is_outlasted(hub, fake_hub, job, tmp_path, trouble, amount):
    fake_hub.inject(trouble, WEIGHTS, times=3, amount=amount)

    fetch_source(hub, job, tmp_path / "source", ignore)

    assert read_all(tmp_path / "source") == expected()


def test_a_body_cut_short_goes_on_where_it_stopped(hub, fake_hub, job, tmp_path):
    fake_hub.inject(Trouble.TRUNCATED, WEIGHTS, skip=HEADER_READS, times=2, amount=CHUNK_BYTES * 20)

    fetch_source(hub, job, tmp_path / "source", ignore)

    sent = sum(each.sent_bytes for each in weight_reads(fake_hub))
    assert sent < len(model_files()[WEIGHTS]) + HEADER_BYTES + 2 * CHUNK_BYTES
    assert read_all(tmp_path / "source") == expected()


def test_a_hub_that_forgets_ranges_after_a_cut_does_not_spoil_the_file(
    hub, fake_hub, job, tmp_path
):
    fake_hub.inject(Trouble.TRUNCATED, WEIGHTS, skip=HEADER_READS, amount=CHUNK_BYTES * 20)
    fake_hub.inject(Trouble.NO_RANGE, WEIGHTS, skip=HEADER_READS + 1)

    fetch_source(hub, job, tmp_path / "source", ignore)

    assert read_all(tmp_path / "source") == expected()


def test_a_later_attempt_goes_on_within_a_file(hub, fake_hub, job, tmp_path):
    fake_hub.inject(Trouble.SLOW, WEIGHTS, skip=HEADER_READS, amount=0.1)

    def kill(done, total):
        if done > 100_000:
            raise Killed

    with pytest.raises(Killed):
        fetch_source(hub, job, tmp_path / "source", kill)
    arrived = (tmp_path / "source" / f"{WEIGHTS}.part").stat().st_size
    fake_hub.requests.clear()
    fetch_source(hub, job, tmp_path / "source", ignore)

    assert arrived > 0
    assert weight_reads(fake_hub)[HEADER_READS].range == f"bytes={arrived}-"
    assert read_all(tmp_path / "source") == expected()


@pytest.mark.parametrize("path", [WEIGHTS, "LICENSE"])
def test_a_file_that_differs_from_its_hash_never_gets_its_name(
    hub, repository, job, tmp_path, path
):
    repository.corrupt(path)

    with pytest.raises(HubUnavailable, match=f"{path} did not arrive"):
        fetch_source(hub, job, tmp_path / "source", ignore)

    assert list((tmp_path / "source").glob(f"{path}*")) == []


def test_a_branch_that_is_named_like_the_commit_deceives_nobody(hub, repository, job, tmp_path):
    good = repository.head
    repository.branches[good] = repository.commit(model_files(LICENSE=b"another licence"))

    with pytest.raises(RevisionNotFound):
        fetch_source(hub, job, tmp_path / "source", ignore)

    assert not (tmp_path / "source").exists()


def test_a_disabled_model_is_gone(hub, repository, job, tmp_path):
    repository.disabled = True

    with pytest.raises(ModelNotFound, match="disabled"):
        fetch_source(hub, job, tmp_path / "source", ignore)


def test_a_file_that_lost_its_content_is_said_to_be_lost(hub, repository, job, tmp_path):
    del repository.blobs["tokenizer.json"]

    with pytest.raises(ModelNotFound, match="lost a file"):
        fetch_source(hub, job, tmp_path / "source", ignore)


@pytest.mark.parametrize(("size", "what"), [(10, "fewer bytes"), (30, "more bytes")])
def test_a_file_of_another_length_than_announced_is_refused(
    hub, repository, job, tmp_path, size, what
):
    repository.serve_instead("LICENSE", b"x" * size)

    with pytest.raises(HubUnavailable, match=what):
        fetch_source(hub, job, tmp_path / "source", ignore)

    assert not (tmp_path / "source" / "LICENSE").exists()


def test_a_short_file_from_a_hub_without_ranges_is_refused(
    hub, fake_hub, repository, job, tmp_path
):
    repository.serve_instead("LICENSE", b"x" * 10)
    fake_hub.inject(Trouble.NO_RANGE, "LICENSE", times=10)

    with pytest.raises(HubUnavailable, match="only 10 bytes"):
        fetch_source(hub, job, tmp_path / "source", ignore)


def test_a_part_that_is_longer_than_its_file_is_fetched_again(hub, job, tmp_path):
    part = tmp_path / "source" / "LICENSE.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 1000)

    fetch_source(hub, job, tmp_path / "source", ignore)

    assert read_all(tmp_path / "source") == expected()


def test_a_part_with_foreign_bytes_is_dropped_and_fetched_again(hub, job, tmp_path):
    part = tmp_path / "source" / "LICENSE.part"
    part.parent.mkdir()
    part.write_bytes(b"x")

    with pytest.raises(HubUnavailable):
        fetch_source(hub, job, tmp_path / "source", ignore)
    fetch_source(hub, job, tmp_path / "source", ignore)

    assert read_all(tmp_path / "source") == expected()


def test_a_gate_that_closed_meanwhile_is_respected(hub, repository, job, tmp_path):
    repository.gated = True

    with pytest.raises(ModelGated):
        fetch_source(hub, job, tmp_path / "source", ignore)

    assert not (tmp_path / "source").exists()


def test_a_hub_that_is_down_for_good_is_given_up(fake_hub, job, tmp_path):
    fake_hub.inject(Trouble.DOWN, WEIGHTS, times=1000)

    with pytest.raises(HubUnavailable):
        fetch_source(make_hub(fake_hub, patience_s=0.5), job, tmp_path / "source", ignore)


@pytest.mark.parametrize("trouble", [Trouble.STALLED, Trouble.SLOW, Trouble.DOWN])
def test_a_cancelled_download_ends_within_seconds(hub, fake_hub, job, tmp_path, trouble):
    fake_hub.inject(trouble, WEIGHTS, skip=HEADER_READS, times=1000, amount=1)
    started, cancelled_at = time.monotonic(), []

    def cancel_after_a_second(done, total):
        if time.monotonic() - started > 1:
            cancelled_at.append(time.monotonic())
            raise Killed

    with pytest.raises(Killed):
        fetch_source(hub, job, tmp_path / "source", cancel_after_a_second)

    assert time.monotonic() - cancelled_at[0] < 20


def test_progress_comes_at_most_twice_a_second(hub, fake_hub, job, tmp_path):
    fake_hub.inject(Trouble.SLOW, WEIGHTS, skip=HEADER_READS, amount=0.02)
    seen, started = [], time.monotonic()

    fetch_source(hub, job, tmp_path / "source", lambda done, total: seen.append(done))

    assert 3 <= len(seen) <= 2 * (time.monotonic() - started) + 1
    assert seen[0] < seen[-1]


def test_the_token_is_sent_to_the_hub_only_and_appears_nowhere(
    fake_hub, repository, job, tmp_path, caplog
):
    repository.gated = True
    caplog.set_level("DEBUG")
    fake_hub.inject(Trouble.DOWN, WEIGHTS)

    fetch_source(make_hub(fake_hub, token=WRITER), job, tmp_path / "source", ignore)

    assert {each.authorization for each in fake_hub.requests} == {f"Bearer {WRITER}"}
    assert WRITER not in caplog.text
    assert WRITER.encode() not in b"".join(read_all(tmp_path / "source").values())
    assert WRITER not in " ".join(Path("/proc/self/cmdline").read_text().split("\0"))


class LocalModel:
    """A model below an operator's root."""

    def __init__(self, fake_hub, root):
        self.folder = root / "nested" / "tiny"
        self.folder.mkdir(parents=True)
        for name, content in model_files().items():
            (self.folder / name).write_bytes(content)
        self.hub = make_hub(fake_hub, models=root)
        self.name = "local:models/nested/tiny"

    def job(self):
        return Job(model=self.name, source_sha=self.hub.resolve(self.name, None).sha)


@pytest.fixture
def local(fake_hub, tmp_path):
    return LocalModel(fake_hub, tmp_path / "models")


def test_a_local_model_is_linked_and_never_changed(local, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in local.folder.iterdir()}

    fetch_source(local.hub, local.job(), tmp_path / "source", ignore)

    assert read_all(tmp_path / "source") == expected()
    assert (tmp_path / "source" / WEIGHTS).samefile(local.folder / WEIGHTS)
    assert {path: path.stat().st_mtime_ns for path in local.folder.iterdir()} == before


def test_a_local_model_on_another_file_system_is_copied(local, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "hardlink_to", refuse)

    fetch_source(local.hub, local.job(), tmp_path / "source", ignore)

    assert read_all(tmp_path / "source") == expected()
    assert not (tmp_path / "source" / WEIGHTS).samefile(local.folder / WEIGHTS)


def test_a_local_model_that_changed_after_it_was_accepted_is_refused(local, tmp_path):
    job = local.job()
    content = bytearray(model_files()[WEIGHTS])
    content[-1] ^= 1
    (local.folder / WEIGHTS).write_bytes(content)

    with pytest.raises(RevisionNotFound):
        fetch_source(local.hub, job, tmp_path / "source", ignore)


def test_a_link_out_of_the_model_is_no_part_of_it(local, tmp_path):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(model_files()[WEIGHTS])
    (local.folder / WEIGHTS).unlink()
    (local.folder / WEIGHTS).symlink_to(secret)

    with pytest.raises(UnsupportedFormat):
        fetch_source(local.hub, local.job(), tmp_path / "source", ignore)


def test_a_link_out_of_the_root_is_no_model(local, tmp_path):
    outside = tmp_path / "outside"
    local.folder.rename(outside)
    local.folder.symlink_to(outside)

    with pytest.raises(Exception, match=r"no local:models/nested/tiny"):
        local.hub.resolve(local.name, None)


@pytest.mark.parametrize(
    "model",
    ["local:models", "local:models/", "local:models/../models/nested/tiny", "local:/etc",
     "local:models/nested//tiny", "local:models/.hidden", "local:other/tiny", "local:"],
)  # fmt: skip
def test_a_local_name_cannot_lead_elsewhere(local, model):
    with pytest.raises(Exception, match=r"no local|root") as refusal:
        local.hub.resolve(model, None)

    assert (refusal.value.status, refusal.value.param) == (422, "model")
