from datetime import UTC, datetime

import pytest

from api.cli.quantities import (
    age_text,
    bits_text,
    bytes_text,
    change_text,
    duration_text,
    loss_text,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (98_362_432, "98.4 MB"), (2e12, "2.00 TB"), (None, "-")],
)
def test_bytes_are_decimal(count, text):
    assert bytes_text(count) == text


def test_chosen_bits_are_counted_by_width():
    bits = {"a": [4, 8], "b": [2, 8], "c": [4, 8]}

    assert bits_text(3.4996, 0.04321, bits) == (
        "3.500 bits per weight (layers: 1 w2a8, 2 w4a8), KL 0.0432"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.42, "8.4 s"), (59.96, "60.0 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (None, "-")],
)
def test_durations_have_two_units_at_most(seconds, text):
    assert duration_text(seconds) == text


def test_a_change_is_signed():
    assert change_text(2.0, 1.0) == "-50 %"
    assert change_text(20.0, 25.0) == "+25 %"
    assert change_text(0.0, 1.0) == "-"


def test_a_small_change_keeps_a_decimal():
    assert change_text(280.0, 278.0) == "-0.7 %"


def test_a_loss_has_three_digits_that_count():
    assert loss_text(0.00012345) == "0.000123"


def test_an_age_is_in_its_largest_unit():
    now = datetime(2026, 1, 2, tzinfo=UTC)

    assert age_text("2026-01-01T23:55:00+00:00", now) == "5 min ago"
    assert age_text("2026-01-01T00:00:00Z", now) == "1 d ago"
    assert age_text("2026-01-01T23:59:59+00:00", now) == "just now"
