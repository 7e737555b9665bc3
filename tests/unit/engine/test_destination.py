"""What a result may take the place of."""

import pytest

from engine.checkpoint.destination import check_destination, partial_of, publish
from engine.checkpoint.format import MANIFEST_NAME
from engine.errors import SpecError


def folder_with(path, *names):
    path.mkdir(parents=True)
    for name in names:
        (path / name).write_text("kept")
    return path


def test_a_missing_an_empty_and_an_earlier_result_may_be_replaced(tmp_path):
    for place in (
        tmp_path / "missing",
        folder_with(tmp_path / "empty"),
        folder_with(tmp_path / "result", MANIFEST_NAME, "config.json"),
    ):
        check_destination(place, apart_from=(tmp_path / "source",))


def test_a_folder_of_something_else_is_refused_and_stays(tmp_path):
    place = folder_with(tmp_path / "documents", "thesis.txt")

    with pytest.raises(SpecError, match="name a new or empty directory") as refused:
        check_destination(place)

    assert (refused.value.field, refused.value.value) == ("out_dir", str(place))
    assert (place / "thesis.txt").exists()


@pytest.mark.parametrize(
    "place", ["source", ".", "source/out", "source/../source", "kept/state/out", "kept"]
)
def test_a_place_that_holds_what_is_read_or_lies_in_it_is_refused(tmp_path, place):
    source = folder_with(tmp_path / "source", "config.json")
    state = folder_with(tmp_path / "kept" / "state")

    with pytest.raises(SpecError, match="apart from"):
        check_destination(tmp_path / place, apart_from=(source, state))


def test_a_place_whose_partial_directory_is_the_state_is_refused(tmp_path):
    with pytest.raises(SpecError, match="apart from"):
        check_destination(tmp_path / "out", apart_from=(tmp_path / ".out.partial",))


def test_a_file_and_a_link_are_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(folder_with(tmp_path / "result", MANIFEST_NAME))

    for name in ("file", "link"):
        with pytest.raises(SpecError, match="a file or a link"):
            check_destination(tmp_path / name)


def test_what_came_to_the_place_meanwhile_stays(tmp_path):
    place = tmp_path / "out"
    folder_with(partial_of(place), MANIFEST_NAME)
    folder_with(place, "thesis.txt")

    with pytest.raises(SpecError, match="something else than a checkpoint"):
        publish(place)

    assert (place / "thesis.txt").exists()


def test_an_earlier_result_gives_way_whole(tmp_path):
    place = folder_with(tmp_path / "out", MANIFEST_NAME, "old")
    folder_with(partial_of(place), MANIFEST_NAME, "new")

    publish(place)

    assert {path.name for path in place.iterdir()} == {MANIFEST_NAME, "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
