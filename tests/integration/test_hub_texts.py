"""Texts of the Hub: pinned, joined as the protocol has it, streamed, and refused by reason."""

import builtins
import os

import pytest

from api.db.tables.jobs import Job
from api.errors import HubUnavailable
from api.hub import datasets
from api.hub.base import TextUse
from api.hub.datasets import HUB_TEXTS
from api.hub.routing import create_texts
from api.settings import HubSettings, Settings
from engine.datasets import TextName
from engine.errors import DatasetUnavailable
from tests.fake_hub import Trouble
from tests.hub_texts import add_texts
from worker.texts import fetch_calibration, fetch_evaluation, text_path

CALIBRATION, EVALUATION = TextUse.CALIBRATION, TextUse.EVALUATION
SEPARATORS = {TextName.WIKITEXT2: "\n\n", TextName.C4: " ", TextName.PTB: " "}


@pytest.fixture
def source(fake_hub):
    return create_texts(Settings(hub=HubSettings(endpoint=fake_hub.url)), patience_s=2.0)


def ignore():
    """Go on."""


def at_once(fetch):
    """Call once and without end."""
    fetch(ignore)


@pytest.mark.parametrize("use", list(TextUse))
@pytest.mark.parametrize("name", list(SEPARATORS))
def test_the_pinned_file_of_each_use_is_joined_as_published(fake_hub, source, tmp_path, name, use):
    rows = add_texts(fake_hub)

    source.fetch(name, use, tmp_path / "new" / "text.txt", ignore)

    assert (tmp_path / "new" / "text.txt").read_text() == SEPARATORS[name].join(rows[name, use])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["text.txt"]


def test_of_a_large_file_no_more_is_read_than_is_needed(fake_hub, source, tmp_path, monkeypatch):
    # noise, so that it stays large when compressed: 17 MB, more than sockets hold on the way
    documents = [os.urandom(10_000).hex() for _ in range(1500)]
    add_texts(fake_hub, documents=documents)
    monkeypatch.setattr(datasets, "CHARACTERS", {EVALUATION: 50_000})

    source.fetch(TextName.C4, EVALUATION, tmp_path / "c4.txt", ignore)

    assert (tmp_path / "c4.txt").read_text() == " ".join(documents[:3])
    assert fake_hub.bytes_of(".json.gz") < 12_000_000


def test_a_busy_hub_is_asked_again(fake_hub, source, tmp_path):
    rows = add_texts(fake_hub)
    fake_hub.inject(Trouble.DOWN, "/resolve/", times=1)

    source.fetch(TextName.WIKITEXT2, EVALUATION, tmp_path / "text.txt", ignore)

    expected = "\n\n".join(rows[TextName.WIKITEXT2, EVALUATION])
    assert (tmp_path / "text.txt").read_text() == expected


def test_bytes_that_are_not_the_announced_ones_are_refused(fake_hub, source, tmp_path):
    add_texts(fake_hub)
    wanted = HUB_TEXTS[TextName.PTB]
    repository = fake_hub.repositories[f"datasets/{wanted.repo_id}"]
    path = wanted.paths[EVALUATION]
    oid = repository.branches[wanted.revision]
    spoiled = bytearray(repository.commits[oid][path].head)
    spoiled[50] ^= 1
    blob = repository.commits[oid][path]
    repository.served[oid] = {**repository.commits[oid], path: blob.of(bytes(spoiled))}

    with pytest.raises(HubUnavailable, match="did not arrive as the Hub announced"):
        source.fetch(TextName.PTB, EVALUATION, tmp_path / "text.txt", ignore)

    assert not list(tmp_path.iterdir())


def test_a_data_set_that_is_gone_is_named(source, tmp_path):
    with pytest.raises(DatasetUnavailable, match="wikitext2 cannot be read from Sales"):
        source.fetch(TextName.WIKITEXT2, EVALUATION, tmp_path / "text.txt", ignore)


@pytest.mark.parametrize("content", [b"no gzip at all", b""])
def test_a_file_of_another_kind_is_refused(fake_hub, source, tmp_path, content):
    add_texts(fake_hub)
    wanted = HUB_TEXTS[TextName.C4]
    repository = fake_hub.repositories[f"datasets/{wanted.repo_id}"]
    repository.tags[wanted.revision] = repository.commit({wanted.paths[EVALUATION]: content})

    with pytest.raises(DatasetUnavailable, match="c4 cannot be read"):
        source.fetch(TextName.C4, EVALUATION, tmp_path / "text.txt", ignore)


def test_without_pyarrow_the_missing_extra_is_named(fake_hub, source, tmp_path, monkeypatch):
    add_texts(fake_hub)
    real_import = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)

    with pytest.raises(DatasetUnavailable, match="install the extra `texts`"):
        source.fetch(TextName.WIKITEXT2, EVALUATION, tmp_path / "text.txt", ignore)


def test_a_wish_to_stop_ends_the_transfer(fake_hub, source, tmp_path):
    add_texts(fake_hub)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.fetch(TextName.C4, EVALUATION, tmp_path / "text.txt", stop)

    assert not list(tmp_path.iterdir())


def test_a_job_gets_each_text_of_the_hub_once(fake_hub, source, tmp_path):
    add_texts(fake_hub)
    job = Job(
        spec={"w_bits": 4, "calibration": {"dataset": "wikitext2"}},
        evaluation={"datasets": ["builtin", "wikitext2", "ptb"]},
    )

    for _ in range(2):
        fetch_calibration(source, job, tmp_path, ignore)
        assert fetch_evaluation(source, job, tmp_path, at_once) == {}

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ptb-evaluation.txt",
        "wikitext2-calibration.txt",
        "wikitext2-evaluation.txt",
    ]
    assert len([path for path in fake_hub.paths() if "/resolve/" in path]) == 3


def test_a_text_that_only_measures_is_told_as_missing(fake_hub, source, tmp_path):
    add_texts(fake_hub)
    del fake_hub.repositories["datasets/allenai/c4"]
    job = Job(spec={"w_bits": 4}, evaluation={"datasets": ["c4", "ptb"]})

    missing = fetch_evaluation(source, job, tmp_path, at_once)

    assert missing.keys() == {"c4"}
    assert "allenai/c4" in missing["c4"]
    assert text_path(tmp_path, TextName.PTB, EVALUATION).is_file()


def test_a_job_that_measures_nothing_fetches_nothing(fake_hub, source, tmp_path):
    job = Job(spec={"w_bits": 4}, evaluation={"enabled": False, "datasets": ["c4"]})

    assert fetch_evaluation(source, job, tmp_path, at_once) == {}
    assert fake_hub.requests == []
