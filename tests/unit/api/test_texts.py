"""Which text a data set's name means."""

import pytest

from api.errors import InvalidRequest
from api.hub.texts import evaluation_texts, find_text, hub_text


@pytest.fixture
def roots(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "text.txt").write_text("some text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "link.txt").symlink_to("/etc/passwd")
    return {"texts": tmp_path}


def test_the_builtin_text_has_no_path(roots):
    assert find_text(roots, "builtin", param="x") is None


def test_a_file_below_a_root_is_found(roots):
    found = find_text(roots, "local:texts/sub/text.txt", param="x")

    assert found.read_text() == "some text"


@pytest.mark.parametrize(
    ("name", "what"),
    [("wikitext", "is no data set"), ("local:texts/empty.txt", "is empty"),
     ("local:texts/link.txt", "There is no"), ("local:texts/sub", "There is no"),
     ("local:texts/../etc", "no local name"), ("local:other/a", "called texts")],
)  # fmt: skip
def test_other_names_are_refused_by_field(roots, name, what):
    with pytest.raises(InvalidRequest, match=what) as refusal:
        find_text(roots, name, param="spec.calibration.dataset")

    assert refusal.value.param == "spec.calibration.dataset"


def test_without_roots_it_says_that_none_is_configured():
    with pytest.raises(InvalidRequest, match="none is configured"):
        find_text({}, "local:texts/a", param="x")


@pytest.mark.parametrize(
    ("asked", "measured"),
    [
        ({}, ["builtin"]),
        ({"dataset": "local:texts/a"}, ["local:texts/a"]),
        ({"dataset": "builtin", "datasets": []}, ["builtin"]),
        ({"dataset": "builtin", "datasets": ["wikitext2", "c4"]}, ["wikitext2", "c4"]),
        ({"datasets": ["builtin", "ptb", "builtin"]}, ["builtin", "ptb"]),
        ({"dataset": "c4", "datasets": ["wikitext2", "c4"]}, ["c4", "wikitext2"]),
    ],
)
def test_one_text_and_several_together_say_what_is_measured(asked, measured):
    assert evaluation_texts(asked) == measured


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
def test_a_text_of_the_hub_is_known_by_its_name(name):
    assert hub_text(name) == name


@pytest.mark.parametrize("name", ["builtin", "local:texts/a", "wikitext"])
def test_other_texts_are_none_of_the_hub(name):
    assert hub_text(name) is None
