"""Tiny checkpoints made without calibration, and the fake-quantized models they come from."""

import torch

from engine.architecture import check_config
from engine.checkpoint.manifest import LayerRecord
from engine.checkpoint.writer import Provenance, write_checkpoint
from engine.models.loading import load_full_precision, read_config
from engine.modules.fake_quant import FakeQuantLinear
from engine.modules.swap import swap_linears
from engine.spec import QuantSpec
from tests.tiny_models import save_tiny_model

REVISION = "0" * 40


def fake_quantized(source, spec):
    """Load a model and see every linear that the spec converts through its grid."""
    model = load_full_precision(source)
    names = {each.name for each in check_config(read_config(source)).linears}

    def twin(name, linear):
        grid = spec.weight_grid(name) if name in names else None
        return grid and FakeQuantLinear(linear, grid, spec.activation_bits(name))

    swap_linears(model, twin)
    return model.eval()


def packed_tensors(model, *, head):
    """What a checkpoint stores of a fake-quantized model, in bfloat16 where it is not packed."""
    swapped = {
        name: each.to_quant_linear()
        for name, each in model.named_modules()
        if isinstance(each, FakeQuantLinear)
    }
    for name, each in swapped.items():
        for part, tensor in each.state_dict().items():
            yield f"{name}.{part}", tensor.to(torch.bfloat16) if part == "bias" else tensor
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in swapped and (head or name != "lm_head.weight"):
            yield name, tensor.to(torch.bfloat16)


def save_checkpoint(tmp_path, spec, family="llama", *, max_shard_bytes=2**31, **fields):
    """Write a tiny source and its checkpoint; return the twin, the directory and the summary."""
    source = save_tiny_model(tmp_path / "source", family, **fields)
    spec = QuantSpec.from_notation(spec) if isinstance(spec, str) else spec
    model = fake_quantized(source, spec)
    config = read_config(source)
    summary = write_checkpoint(
        tmp_path / "checkpoint",
        config=config,
        tensors=packed_tensors(model, head=not config["tie_word_embeddings"]),
        spec=spec,
        provenance=Provenance(
            source_dir=source,
            engine_version="1.2.3",
            repo="tiny/model",
            revision=REVISION,
            layers=[
                LayerRecord(
                    name="model.layers.0",
                    w_bits=spec.w_bits,
                    a_bits=spec.a_bits,
                    group_size=spec.group_size,
                    loss_before=0.25,
                    loss_after=0.125,
                )
            ],
        ),
        max_shard_bytes=max_shard_bytes,
    )
    return model, tmp_path / "checkpoint", summary
