"""What the model card says, whatever the source's fields hold."""

import json

import pytest
import yaml

from api.hub.base import ResolvedModel
from api.hub.card import write_card
from tests.artifact_files import save_artifact


@pytest.fixture
def manifest(tmp_path):
    folder = save_artifact(tmp_path / "out")
    return json.loads((folder / "abq_manifest.json").read_text())


def card_of(manifest, **fields):
    resolved = ResolvedModel(**({"model": "acme/tiny", "sha": "a" * 40, "files": ()} | fields))
    return write_card(resolved=resolved, manifest=manifest, repo_id="acme/out", tag="job_1")


def front_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_fields_the_source_does_not_have_are_left_out(manifest):
    front = front_of(card_of(manifest))

    assert not {"license", "license_name", "license_link"} & set(front)
    assert front["pipeline_tag"] == "text-generation"


@pytest.mark.parametrize(
    "value",
    ["apache-2.0", "yes", "1.0", "null", 'a"b', "a\n---\nbase_model: evil/x", "a: b # c", "é"],
)
def test_a_field_of_the_source_stays_one_value(manifest, value):
    front = front_of(card_of(manifest, license=value))

    assert front["license"] == value
    assert front["base_model"] == "acme/tiny"


def test_a_local_source_is_no_base_model_of_the_hub(manifest):
    card = card_of(manifest, model="local:models/tiny")

    assert not {"base_model", "base_model_relation"} & set(front_of(card))
    assert "huggingface" not in card
    assert "hf.co" not in card


def test_bits_that_are_not_quantized_are_named_so(manifest):
    card = card_of(manifest)

    assert "| Weights | 3 bits |" in card
    assert "| Activations | 8 bits |" in card
    assert "| KV cache | not quantized |" in card


def test_five_levels_are_named_balanced(manifest):
    manifest["spec"] |= {"w_bits": 2, "bit_balance": True, "group_size": -1, "kv_bits": 4}

    card = card_of(manifest)

    assert "2 bits, bit-balanced" in card
    assert "per channel" in card
    assert "abq-w2*a8kv4" in front_of(card)["tags"]
