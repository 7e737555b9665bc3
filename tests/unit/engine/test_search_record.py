import json

import pytest

from engine.checkpoint.manifest import read_manifest, write_manifest
from engine.checkpoint.search_record import ChosenBits, SearchRecord
from engine.errors import CheckpointInvalid
from engine.target import BitTarget
from tests.unit.engine.quantized_models import save_checkpoint

RECORD = SearchRecord(
    target=BitTarget(average_bits=3.5, w_choices=(2, 4), a_choices=(8,)),
    windows=2,
    length=32,
    anchors=2,
    flops=1e9,
    predicted_weight_loss=0.25,
    predicted_activation_loss=0.125,
    predicted_average_bits=3.4,
    predicted_bytes=1000,
    price=0.5,
    layers=(
        ChosenBits(
            name="model.layers.0.mlp.up_proj",
            w_bits=4,
            a_bits=8,
            is_pinned=False,
            w_losses={"2": 0.5, "4": 0.25},
            a_losses={"8": 0.125},
            price_of_last=0.5,
            price_of_next=None,
        ),
    ),
)


def test_a_record_survives_json():
    assert SearchRecord.from_json(json.loads(json.dumps(RECORD.to_json()))) == RECORD


def test_the_summary_has_the_bits_and_what_was_predicted():
    assert RECORD.summary() == {
        "predicted_average_bits": 3.4,
        "predicted_loss": 0.375,
        "bits": {"model.layers.0.mlp.up_proj": (4, 8)},
    }


def test_what_was_counted_is_added_at_the_end():
    assert RECORD.achieved_average_bits is None
    assert RECORD.achieving(3.4).achieved_average_bits == 3.4


@pytest.mark.parametrize("damage", [{"target": {}}, {"layers": [{"name": "x"}]}, {"extra": 1}])
def test_a_damaged_record_in_a_manifest_is_refused(tmp_path, damage):
    directory = save_checkpoint(tmp_path, "w4a8")[1]
    path = directory / "abq_manifest.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"search": RECORD.to_json() | damage}))

    with pytest.raises(CheckpointInvalid, match="damaged"):
        read_manifest(directory)


def test_a_manifest_without_a_search_says_nothing_of_one(tmp_path):
    directory = save_checkpoint(tmp_path, "w4a8")[1]
    text = (directory / "abq_manifest.json").read_text()

    manifest = read_manifest(directory)
    write_manifest(directory, manifest)

    assert manifest.search is None
    assert (directory / "abq_manifest.json").read_text() == text
