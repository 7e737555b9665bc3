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
from engine.spec import LayerOverride, QuantSpec
from engine.target import BitTarget

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
    "epochs_factor": (1, 2),
}
BITS = {"a_bits": 8, "per_channel": True}

OF_THE_MODEL = ("rotation", "online_hadamard", "epochs_factor")
"""Folded into the model before any method sees it, or into how long it is applied."""


def test_recipes_answer_the_questions_that_ingredients_ask():
    assert {each.name for each in fields(Ingredients)} == {each.name for each in fields(Resolved)}
    assert {each.name for each in fields(Resolved)} == OTHER_ANSWERS.keys()


@pytest.mark.parametrize("recipe", Recipe)
@pytest.mark.parametrize("name", OTHER_ANSWERS)
def test_an_ingredient_answers_its_question_and_no_other(recipe, name):
    plain = resolve(recipe, Ingredients(), **BITS)

    for answer in OTHER_ANSWERS[name]:
        found = resolve(recipe, Ingredients(**{name: answer}), **BITS)

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


@pytest.mark.parametrize(
    ("a_bits", "per_channel", "rotates", "transforms_online"),
    [
        (16, True, True, False),
        (16, False, False, False),
        (8, True, True, True),
        (8, False, True, True),
        (4, False, True, True),
    ],
)
def test_whole_channels_and_rounded_inputs_are_rotated(
    a_bits, per_channel, rotates, transforms_online
):
    for recipe in (Recipe.FAST, Recipe.DEFAULT, Recipe.ACCURATE):
        found = resolve(recipe, Ingredients(), a_bits=a_bits, per_channel=per_channel)

        assert (found.rotation, found.online_hadamard) == (rotates, transforms_online)


@pytest.mark.parametrize(
    ("fields", "narrowest"),
    [
        ({}, 16),
        ({"overrides": (LayerOverride(pattern="*.down_proj", a_bits=4),)}, 4),
        ({"overrides": (LayerOverride(pattern="*.down_proj", w_bits=16, a_bits=4),)}, 16),
        ({"overrides": (LayerOverride(pattern="*.down_proj", w_bits=3),)}, 16),
        ({"target": BitTarget(average_bits=4.8, a_choices=(6, 16))}, 6),
        ({"a_bits": 4, "target": BitTarget(average_bits=4.8, a_choices=(8, 16))}, 4),
    ],
)
def test_a_recipe_is_resolved_by_the_narrowest_inputs_that_a_layer_may_have(fields, narrowest):
    spec = QuantSpec(w_bits=4, group_size=32, **fields)

    assert spec.narrowest_inputs == narrowest
    assert spec.resolved.rotation is spec.resolved.online_hadamard is (narrowest < 16)


def test_the_accurate_recipe_passes_three_times_as_often():
    spec = QuantSpec(w_bits=4, recipe=Recipe.ACCURATE)

    assert spec.trained_epochs == 3 * spec.calibration.epochs


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
