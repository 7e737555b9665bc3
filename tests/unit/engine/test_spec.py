import json

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from engine.architecture import LinearShape
from engine.checkpoint.format import quantization_section, spec_of_section
from engine.errors import SpecError
from engine.reach import stored_bits
from engine.spec import CalibrationSpec, LayerOverride, QuantSpec, Recipe
from engine.target import BitTarget


@pytest.mark.parametrize(
    "notation", ["w4a8", "w2*a8", "w1*a16", "w4a16g64", "w4a8kv8", "w3a6g128kv4", "w8a8", "w1a2"]
)
def test_the_papers_notation_reads_back_as_written(notation):
    assert QuantSpec.from_notation(notation).notation == notation


def test_notation_sets_each_field():
    spec = QuantSpec.from_notation("W2*A8G64KV4")

    assert (spec.w_bits, spec.bit_balance, spec.a_bits) == (2, True, 8)
    assert (spec.group_size, spec.kv_bits) == (64, 4)


def test_a_spec_survives_json_with_every_field_set():
    spec = QuantSpec(
        w_bits=2,
        a_bits=8,
        kv_bits=4,
        group_size=64,
        symmetric=True,
        bit_balance=True,
        overrides=(LayerOverride(pattern="*.down_proj", w_bits=8, a_bits=16, group_size=32),),
        recipe=Recipe.RTN,
        calibration=CalibrationSpec(samples=3, length=64, epochs=1, seed=7),
    )

    assert QuantSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("fields", "field", "remedy"),
    [
        ({"w_bits": 9}, "w_bits", "use 1 to 8"),
        ({"w_bits": 0}, "w_bits", "use 1 to 8"),
        ({"w_bits": True}, "w_bits", "use 1 to 8"),
        ({"w_bits": 4, "a_bits": 1}, "a_bits", "use 2 to 8 or 16"),
        ({"w_bits": 4, "a_bits": 12}, "a_bits", "use 2 to 8 or 16"),
        ({"w_bits": 4, "kv_bits": 9}, "kv_bits", "use 2 to 8 or 16"),
        ({"w_bits": 4, "group_size": 48}, "group_size", "multiple of 32"),
        ({"w_bits": 4, "group_size": 0}, "group_size", "multiple of 32"),
        ({"w_bits": 4, "symmetric": "no"}, "symmetric", "use true or false"),
        (
            {"w_bits": 4, "ingredients": {"rotation": "yes"}},
            "ingredients.rotation",
            "use true or false",
        ),
        ({"w_bits": 3, "bit_balance": True}, "bit_balance", "use w_bits 1 or 2"),
        ({"w_bits": 1, "symmetric": True}, "symmetric", "add bit_balance"),
        (
            {"w_bits": 4, "recipe": "magic"},
            "recipe",
            "use one of rtn, lwc, omniquant, fast, default, accurate",
        ),
        ({"w_bits": 4, "groupsize": 64}, "groupsize", "group_size"),
        ({"w_bits": 4, "calibration": {"samples": 0}}, "calibration.samples", "use 1 to 4096"),
        ({"w_bits": 4, "calibration": {"seeds": 1}}, "calibration.seeds", "seed"),
        ({"w_bits": 4, "calibration": {"dataset": "/etc/passwd"}}, "calibration.dataset", "local:"),
        ({"w_bits": 4, "overrides": [{"pattern": "x"}]}, "overrides", "set w_bits"),
        ({"w_bits": 4, "overrides": [{"pattern": "x", "w_bits": 9}]}, "overrides.w_bits", "1 to 8"),
    ],
)
def test_an_impossible_spec_names_field_value_and_remedy(fields, field, remedy):
    with pytest.raises(SpecError) as refusal:
        QuantSpec.from_json(fields)

    assert refusal.value.field == field
    assert remedy in refusal.value.message


@pytest.mark.parametrize("notation", ["", "w4", "a8w4", "w4a8g", "w4a8kv8g64kv4", "w4a8x", "w4a8*"])
def test_notation_that_is_none_is_refused(notation):
    with pytest.raises(SpecError):
        QuantSpec.from_notation(notation)


@pytest.mark.parametrize(
    ("notation", "planes", "promised"),
    [("w3a8", 3, 3 + 24 / 4096), ("w2*a8", 3, 3 + 24 / 4096), ("w1*a8", 2, 2 + 24 / 4096),
     ("w2a8g64", 2, 2.375), ("w8a16g32", 8, 8.75)],
)  # fmt: skip
def test_a_grid_promises_its_planes_and_its_scales(notation, planes, promised):
    grid = QuantSpec.from_notation(notation).weight_grid("model.layers.0.mlp.up_proj")

    assert grid.planes == planes
    assert grid.promised_bits(4096) == promised


def test_a_row_that_ends_inside_a_word_pays_for_the_whole_word():
    grid = QuantSpec.from_notation("w3a16").weight_grid("model.layers.0.mlp.up_proj")
    linear = LinearShape(name="up_proj", out_features=7, in_features=50)

    assert grid.promised_bits(50) == 3 * 64 / 50 + 24 / 50
    assert 7 * 50 * grid.promised_bits(50) == pytest.approx(stored_bits(linear, grid))


def test_what_a_search_finds_for_a_large_model_survives_json():
    found = tuple(
        LayerOverride(pattern=f"model.layers.{index}.mlp.up_proj", w_bits=2 + index % 5)
        for index in range(600)
    )
    spec = QuantSpec(w_bits=4, overrides=found, target=BitTarget(max_bytes=10**9))

    assert QuantSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    section = {"quantization_config": quantization_section(spec, ["lm_head"])}
    assert spec_of_section(json.loads(json.dumps(section))).overrides == found


def test_the_last_matching_override_decides():
    spec = QuantSpec(
        w_bits=4,
        a_bits=8,
        overrides=(
            LayerOverride(pattern="*.mlp.*", w_bits=3),
            LayerOverride(pattern="*.down_proj", w_bits=8, a_bits=16),
            LayerOverride(pattern="model.layers.1.*", w_bits=16),
        ),
    )

    assert spec.weight_grid("model.layers.0.mlp.up_proj").bits == 3
    assert spec.weight_grid("model.layers.0.mlp.down_proj").bits == 8
    assert spec.activation_bits("model.layers.0.mlp.down_proj") == 16
    assert spec.activation_bits("model.layers.0.mlp.up_proj") == 8
    assert spec.weight_grid("model.layers.1.mlp.down_proj") is None


def test_bit_balance_leaves_wider_overrides_on_the_plain_grid():
    spec = QuantSpec(
        w_bits=2, bit_balance=True, overrides=(LayerOverride(pattern="*.o_proj", w_bits=4),)
    )

    assert spec.weight_grid("model.layers.0.self_attn.o_proj").max_code == 15
    assert spec.weight_grid("model.layers.0.self_attn.q_proj").max_code == 4


def test_pydantic_reads_a_spec_as_a_field_and_refuses_unknown_ones():
    class Request(BaseModel):
        model_config = ConfigDict(extra="forbid")
        spec: QuantSpec

    request = Request.model_validate({"spec": {"w_bits": 3, "calibration": {"seed": 5}}})

    assert request.spec.calibration.seed == 5
    with pytest.raises(ValidationError, match="groupsize"):
        Request.model_validate({"spec": {"w_bits": 3, "groupsize": 64}})


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({}, "w_bits"),
        ({"w_bits": 4, "overrides": None}, "overrides"),
        ({"w_bits": 4, "overrides": "abc"}, "overrides"),
        ({"w_bits": 4, "overrides": ["abc"]}, "overrides"),
        ({"w_bits": 4, "overrides": [{"w_bits": 3}]}, "overrides.pattern"),
        ({"w_bits": 4, "overrides": [{"pattern": 3, "w_bits": 3}]}, "overrides.pattern"),
        ({"w_bits": 4, "calibration": None}, "calibration"),
        ({"w_bits": 4, "target": {"average_bits": 4, "w_choices": 4}}, "target.w_choices"),
        ({"w_bits": 4, "target": {"average_bits": 4, "a_choices": None}}, "target.a_choices"),
    ],
)
def test_json_that_is_no_spec_is_refused_by_its_field(record, field):
    with pytest.raises(SpecError) as refused:
        QuantSpec.from_json(record)

    assert refused.value.field == field
