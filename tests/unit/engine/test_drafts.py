import pytest

from engine.inference.drafts import NgramDrafts


def test_what_followed_the_longest_known_suffix_is_proposed():
    # the single 3 was followed by 9 last, but 2 3 was followed by 4
    tokens = [1, 2, 3, 4, 5, 3, 9, 2, 3]

    assert NgramDrafts().propose(tokens, 2) == (4, 5)


def test_the_last_of_several_occurrences_counts():
    assert NgramDrafts().propose([7, 1, 7, 2, 7], 1) == (2,)


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3]])
def test_nothing_is_proposed_behind_what_is_new(tokens):
    assert NgramDrafts().propose(tokens, 3) == ()


def test_no_more_is_proposed_than_the_text_has():
    assert NgramDrafts().propose([5, 5], 4) == (5,)


def test_what_grew_step_by_step_is_proposed_as_of_the_whole():
    tokens = [1, 2, 1, 3, 1, 2, 2, 1, 2]
    growing = NgramDrafts()

    proposed = [growing.propose(tokens[:end], 3) for end in range(1, len(tokens) + 1)]

    assert proposed == [NgramDrafts().propose(tokens[:end], 3) for end in range(1, 10)]
