import json
from dataclasses import replace

import pytest

from engine.architecture import check_config
from engine.checkpoint.format import rotation_of_section, rotation_section
from engine.checkpoint.reader import load_checkpoint
from engine.errors import CheckpointInvalid, SpecError
from engine.families.registry import FAMILIES
from engine.fit import check_spec
from engine.models.loading import read_config
from engine.recipe import Ingredients
from engine.rotation import Rotation, name_in_layer, online_blocks
from engine.spec import CalibrationSpec, QuantSpec, Recipe
from tests.tiny_models import save_tiny_model
from tests.unit.engine.quantized_models import save_checkpoint

BOTH = Rotation(seed=3, online_hadamard=True)
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "vocab_size": 100,
    "num_attention_heads": 9,
}
ARCHITECTURE = check_config(CONFIG)


def test_ingredients_say_what_is_rotated():
    def of(**ingredients):
        calibration = CalibrationSpec(seed=7)
        asked = Ingredients(**ingredients)
        return Rotation.of(
            QuantSpec(w_bits=4, recipe=Recipe.RTN, calibration=calibration, ingredients=asked),
            ARCHITECTURE,
        )

    assert of() == Rotation.none()
    assert of(rotation=True) == Rotation(seed=7, online_hadamard=False)
    assert of(rotation=True, online_hadamard=True) == Rotation(seed=7, online_hadamard=True)
    assert of(rotation=False).is_none


@pytest.mark.parametrize("seed", [-1, 2**31, True, "0", 1.5])
def test_an_impossible_seed_is_refused(seed):
    with pytest.raises(SpecError, match=r"rotation\.seed"):
        Rotation(seed=seed, online_hadamard=False)


@pytest.mark.parametrize("width", [(1536, 1536), (11008, 256)])
def test_the_linears_behind_the_online_transform_are_the_last_of_the_mlp(width):
    intermediate, block = width
    architecture = check_config({**CONFIG, "intermediate_size": intermediate})

    assert online_blocks(architecture, BOTH) == {"mlp.down_proj": block}
    assert online_blocks(architecture, Rotation(seed=3, online_hadamard=False)) == {}


def test_a_width_that_nothing_mixes_is_left_alone():
    assert online_blocks(check_config({**CONFIG, "intermediate_size": 1535}), BOTH) == {}


def test_a_family_may_name_the_linears_itself(monkeypatch):
    class Naming:
        layers = "model.layers"
        online_hadamard = ("*.o_proj",)

    monkeypatch.setitem(FAMILIES, "llama", Naming)

    assert online_blocks(ARCHITECTURE, BOTH) == {"self_attn.o_proj": 576}


def test_a_full_name_is_cut_behind_its_layer():
    assert name_in_layer(ARCHITECTURE, "model.layers.12.mlp.up_proj") == "mlp.up_proj"


@pytest.mark.parametrize("ingredients", [Ingredients(rotation=True), Ingredients()])
def test_a_spec_is_refused_where_the_family_cannot_be_rotated(monkeypatch, ingredients):
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], rotates=False))
    spec = QuantSpec(w_bits=4, ingredients=ingredients)

    if ingredients.rotation is None:
        check_spec(ARCHITECTURE, spec)
        return
    with pytest.raises(SpecError, match=r"ingredients\.rotation.*leave it out"):
        check_spec(ARCHITECTURE, spec)


def test_the_section_says_what_a_reader_must_compute():
    assert rotation_section(ARCHITECTURE, BOTH) == {
        "residual_seed": 3,
        "residual_factors": [24, 24],
        "online_hadamard": True,
        "online_factors": {"mlp.down_proj": [32, 48]},
    }


@pytest.mark.parametrize(
    "rotation",
    [BOTH, Rotation(seed=0, online_hadamard=False), Rotation(seed=None, online_hadamard=True)],
)
def test_a_section_reads_back_as_it_was_written(rotation):
    section = json.loads(json.dumps(rotation_section(ARCHITECTURE, rotation)))

    read = rotation_of_section({"quantization_config": {"rotation": section}}, ARCHITECTURE)

    assert read == rotation


def test_a_checkpoint_without_a_section_is_not_rotated(tmp_path):
    directory = save_checkpoint(tmp_path, "w4a8")[1]

    assert "rotation" not in read_config(directory)["quantization_config"]
    assert load_checkpoint(directory).rotation == Rotation.none()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"residual_seed": -4}, "rotation.seed"),
        ({"residual_seed": "3"}, "rotation.seed"),
        ({"online_hadamard": "yes"}, "online_hadamard 'yes' is neither"),
        ({"residual_factors": [8, 72]}, r"residual_factors is \[8, 72\]; this version reads \[24"),
        ({"online_factors": {"mlp.down_proj": [16, 96]}}, "online_factors"),
        ({"online_factors": {}}, "online_factors"),
        ({"residual_seed": None}, "residual_factors"),
        ({"learned": True}, "rotation.learned is True; this version reads None"),
    ],
)
def test_a_section_that_this_version_cannot_follow_is_refused(changes, match):
    section = {**rotation_section(ARCHITECTURE, BOTH), **changes}

    with pytest.raises(CheckpointInvalid, match=match):
        rotation_of_section({"quantization_config": {"rotation": section}}, ARCHITECTURE)


@pytest.mark.parametrize("section", ["yes", 3, []])
def test_a_section_that_is_no_object_is_refused(section):
    with pytest.raises(CheckpointInvalid, match="no JSON object"):
        rotation_of_section({"quantization_config": {"rotation": section}}, ARCHITECTURE)


def test_a_section_with_a_field_too_few_is_refused():
    section = rotation_section(ARCHITECTURE, BOTH)
    del section["online_factors"]

    with pytest.raises(CheckpointInvalid, match="online_factors is None"):
        rotation_of_section({"quantization_config": {"rotation": section}}, ARCHITECTURE)


def test_a_section_for_a_family_that_cannot_be_rotated_is_refused(monkeypatch, tmp_path):
    architecture = check_config(read_config(save_tiny_model(tmp_path)))
    section = rotation_section(architecture, BOTH)

    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], rotates=False))

    with pytest.raises(CheckpointInvalid, match="cannot be rotated"):
        rotation_of_section({"quantization_config": {"rotation": section}}, architecture)
