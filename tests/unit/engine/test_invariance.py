"""Which models give the same tokens in every batch, and that they do."""

import pytest
import torch

from engine.architecture import check_config
from engine.checkpoint.reader import load_checkpoint
from engine.inference.decoder import Decoder
from engine.inference.invariance import BatchesDiffer, check_invariance
from engine.models.loading import read_config
from engine.spec import LayerOverride, QuantSpec
from tests.tiny_models import save_tiny_model
from tests.unit.engine.quantized_models import save_checkpoint
from tests.unit.engine.runner_bench import Bench, text


@pytest.mark.parametrize(
    ("notation", "family", "head_bits", "message"),
    [
        ("w4a8", "llama", None, "head_bits = None: use 8"),
        ("w4a8", "llama", 4, "head_bits = 4: use 8"),
        ("w4a16", "llama", 8, r"layers.0\S*: a product in floating point"),
        ("w4a8g32", "llama", 8, "group_size = 32 has floating-point sums"),
        ("w4a8", "mixtral", 8, "experts: their router"),
    ],
)
def test_what_depends_on_the_batch_is_named(tmp_path, notation, family, head_bits, message):
    architecture = check_config(read_config(save_tiny_model(tmp_path, family)))

    with pytest.raises(BatchesDiffer, match=message):
        check_invariance(architecture, QuantSpec.from_notation(notation), head_bits)


def test_a_layer_left_in_full_precision_is_named(tmp_path):
    architecture = check_config(read_config(save_tiny_model(tmp_path, "llama")))
    spec = QuantSpec(
        w_bits=4, a_bits=8, overrides=(LayerOverride(pattern="*.1.*down_proj", w_bits=16),)
    )

    with pytest.raises(BatchesDiffer, match=r"layers.1.mlp.down_proj: a product in floating"):
        check_invariance(architecture, spec, 8)
    check_invariance(architecture, QuantSpec.from_notation("w4a8"), 8)


@pytest.mark.parametrize("notation", ["w4a8", "w2*a8kv4"])
def test_logits_are_the_same_bits_alone_and_in_a_batch(tmp_path, notation):
    loaded = load_checkpoint(save_checkpoint(tmp_path, notation)[1])
    check_invariance(loaded.architecture, loaded.spec, 8)
    decoder = Watched(Decoder.from_loaded(loaded, 8))
    prompts = [text(7 + 5 * slot, slot) for slot in range(4)]

    alone = [decode([prompt], decoder, loaded.spec.kv_bits)[0] for prompt in prompts]
    together = decode(prompts, decoder, loaded.spec.kv_bits)

    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


class Watched:
    """A decoder that keeps the logits of its last batch."""

    def __init__(self, decoder):
        self._decoder = decoder
        self.last = None

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def forward(self, batch, pages):
        self.last = self._decoder.forward(batch, pages)
        return self.last


def decode(prompts, decoder, kv_bits, steps=4):
    """Logits ``[steps, V]`` of every sequence, whose prompts are computed one by one."""
    bench = Bench(decoder, kv_bits=kv_bits)
    for slot, prompt in enumerate(prompts):
        bench.open(slot)
        bench.run(bench.step(slot, 0, prompt))
    logits = []
    for step in range(steps):
        slots = range(len(prompts))
        bench.run(*(bench.step(slot, len(prompts[slot]) + step) for slot in slots))
        logits.append(decoder.last)
    return torch.stack(logits).unbind(1)
