"""What the model card says, whatever the source's fields hold."""

import json

import pytest
import yaml

from api.hub.base import ResolvedModel
from api.hub.card import write_card
from tests.artifact_files import save_artifact
from tests.unit.engine.evaluations import an_evaluation


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


def test_a_manifest_of_an_earlier_engine_shows_its_one_perplexity(manifest):
    card = card_of(manifest)

    assert "| Perplexity of the source, 4096 tokens of builtin | 20.820 |" in card
    assert "KL divergence" not in card


def test_every_text_and_task_that_was_measured_is_on_the_card(manifest):
    manifest["evaluation"] = an_evaluation().to_json()

    card = card_of(manifest)

    assert "| Perplexity of this model, same tokens | 22.250 |" in card
    assert "| KL divergence from the source, mean a token | 0.0200 nats |" in card
    assert "| Same most likely token as the source | 93.8% |" in card
    assert "| piqa, acc, 4 examples | 0.2500 (source 0.5000) |" in card
    results = front_of(card)["model-index"][0]["results"]
    assert [each["dataset"]["name"] for each in results] == ["wikitext2", "piqa"]
    assert "boolq" not in card


def test_an_evaluation_that_failed_says_so_and_claims_nothing(manifest):
    manifest["evaluation"] = {"status": "failed", "perplexity": None}

    card = card_of(manifest)

    assert "| Perplexity | not measured (failed) |" in card
    assert "model-index" not in front_of(card)
