"""Recipes answer every question, and every ingredient answers one of them otherwise."""

from dataclasses import fields

import pytest

from engine.methods.recipes import method_of
from engine.recipe import (
    Clipping,
    EndToEnd,
    Ingredients,
    Recipe,
    Resolved,
    Rounding,
    SecondOrder,
    resolve,
)
from engine.spec import QuantSpec

OTHER_ANSWERS = {
    "rotation": (True, False),
    "online_hadamard": (True, False),
    "equivalent_transform": (True, False),
    "clipping": tuple(Clipping),
    "second_order": tuple(SecondOrder),
    "rounding": tuple(Rounding),
    "compensation": (True, False),
    "own_input_loss": (0.0, 0.5),
    "cosine_loss": (0.0, 0.5),
    "attention_loss": (0.0, 0.5),
    "end_to_end": tuple(EndToEnd),
    "end_to_end_epochs": (0, 3),
}

OF_THE_MODEL = ("rotation", "online_hadamard")
"""Folded into the model before any method sees it."""


def test_recipes_answer_the_questions_that_ingredients_ask():
    assert {each.name for each in fields(Ingredients)} == {each.name for each in fields(Resolved)}
    assert {each.name for each in fields(Resolved)} == OTHER_ANSWERS.keys()


@pytest.mark.parametrize("recipe", Recipe)
@pytest.mark.parametrize("name", OTHER_ANSWERS)
def test_an_ingredient_answers_its_question_and_no_other(recipe, name):
    plain = resolve(recipe, Ingredients(), 8)

    for answer in OTHER_ANSWERS[name]:
        found = resolve(recipe, Ingredients(**{name: answer}), 8)

        assert getattr(found, name) == answer
        others = [each for each in OTHER_ANSWERS if each != name]
        assert all(getattr(found, each) == getattr(plain, each) for each in others)


@pytest.mark.parametrize("name", [each for each in OTHER_ANSWERS if each not in OF_THE_MODEL])
def test_what_is_answered_reaches_the_method(name):
    methods = [
        describe(method_of(QuantSpec(w_bits=4, ingredients=Ingredients(**{name: answer}))))
        for answer in OTHER_ANSWERS[name]
    ]

    assert all(methods.count(each) == 1 for each in methods)


@pytest.mark.parametrize("recipe", Recipe)
def test_ingredients_and_recipes_survive_a_file(recipe):
    everything = Ingredients(**{name: answers[-1] for name, answers in OTHER_ANSWERS.items()})
    spec = QuantSpec(w_bits=4, recipe=recipe, ingredients=everything)

    assert QuantSpec.from_json(spec.to_json()) == spec


def describe(method):
    """What a method is made of, to compare."""
    values = {each.name: getattr(method, each.name) for each in fields(method)}
    return {
        name: (type(value), vars(value)) if hasattr(value, "__dict__") else value
        for name, value in values.items()
    }
