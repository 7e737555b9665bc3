"""Prompts of plain completions, where no body is too large."""

import pytest

from api.schemas.completions import MAX_CHARACTERS, MAX_PROMPTS, read_prompts
from api.schemas.json_values import JsonValueInvalid


def test_a_prompt_of_too_many_characters_is_refused_by_its_place():
    with pytest.raises(JsonValueInvalid, match=f"1 = .* use up to {MAX_CHARACTERS}") as caught:
        read_prompts(["a", "b" * (MAX_CHARACTERS + 1)])

    assert caught.value.place == ("1",)


def test_too_many_prompts_are_refused():
    with pytest.raises(ValueError, match=f"use up to {MAX_PROMPTS} prompts"):
        read_prompts(["a"] * (MAX_PROMPTS + 1))
