import hashlib

import pytest
import torch

from engine.calibration.dataset import (
    BuiltinText,
    consecutive_windows,
    load_tokenizer,
    read_text,
    sample_windows,
    tokenize,
)
from engine.errors import DatasetUnavailable, UnsupportedModel
from tests.tiny_llama import save_tiny_llama

IDS = torch.arange(1000)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one two three")
    return read_text(path, BuiltinText.CALIBRATION)


def test_the_builtin_texts_are_long_enough_and_differ():
    calibration = read_text(None, BuiltinText.CALIBRATION)
    evaluation = read_text(None, BuiltinText.EVALUATION)

    assert len(calibration.content.encode()) + len(evaluation.content.encode()) < 300_000
    assert min(len(calibration.content), len(evaluation.content)) > 80_000
    shared = set(calibration.content.split("\n\n")) & set(evaluation.content.split("\n\n"))
    assert all(len(paragraph) < 40 for paragraph in shared)


def test_a_text_is_identified_by_its_bytes(text):
    assert text.sha256 == hashlib.sha256(b"one two three").hexdigest()
    assert text.name == "text.txt"


def test_line_ends_of_other_systems_give_the_same_tokens(tmp_path):
    (tmp_path / "crlf.txt").write_bytes(b"a\r\nb\r\n")

    assert read_text(tmp_path / "crlf.txt", BuiltinText.EVALUATION).content == "a\nb\n"


def test_a_missing_text_is_refused(tmp_path):
    with pytest.raises(DatasetUnavailable, match=r"none\.txt does not exist"):
        read_text(tmp_path / "none.txt", BuiltinText.CALIBRATION)


def test_a_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")

    with pytest.raises(DatasetUnavailable, match="not UTF-8"):
        read_text(tmp_path / "latin.txt", BuiltinText.CALIBRATION)


def test_equal_seeds_sample_equal_windows(text):
    first = sample_windows(text, IDS, 5, 16, seed=3)
    again = sample_windows(text, IDS, 5, 16, seed=3)
    other = sample_windows(text, IDS, 5, 16, seed=4)

    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_sampled_windows_are_pieces_of_the_text(text):
    windows = sample_windows(text, IDS, 5, 16, seed=0).tokens

    assert windows.shape == (5, 16)
    assert torch.equal(windows, windows[:, :1] + torch.arange(16))
    assert len(windows[:, 0].unique()) == 5


def test_consecutive_windows_do_not_overlap_and_leave_the_ragged_end(text):
    windows = consecutive_windows(text, IDS, None, 300).tokens

    assert torch.equal(windows.flatten(), IDS[:900])


def test_a_text_with_fewer_windows_gives_what_it_has(text):
    assert consecutive_windows(text, IDS, 16, 300).tokens.shape == (3, 300)


@pytest.mark.parametrize("cut", [sample_windows, consecutive_windows])
def test_a_text_that_is_too_short_is_refused_with_what_it_has(text, cut):
    arguments = (4, 998, 0) if cut is sample_windows else (4, 1001)

    with pytest.raises(DatasetUnavailable, match="1000 tokens"):
        cut(text, IDS, *arguments)


def test_a_tokenizer_that_truncates_sees_the_whole_text(tmp_path, text):
    tokenizer = load_tokenizer(save_tiny_llama(tmp_path))
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    ids = tokenize(load_tokenizer(tmp_path), text)

    assert len(ids) == len("one two three")


def test_a_broken_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')

    with pytest.raises(UnsupportedModel, match="broken"):
        load_tokenizer(tmp_path)


def test_a_model_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
