"""GPTQ (second-order rounding, column by column), from the package `llmcompressor`.

Its own defaults: blocks of 128 columns, one per cent of dampening, static activation ordering,
each layer's inputs from the quantized layers before it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from typing_extensions import override

from benchmarks.peers.base import Peer, PeerJob
from engine.spec import PER_CHANNEL

__all__ = ["GptqPeer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqPeer(Peer):
    """GPTQ."""

    @override
    def quantize(self, job: PeerJob) -> dict[str, torch.Tensor]:
        """Round layer by layer, on the accelerator where there is one: the package chooses."""
        from llmcompressor import oneshot  # noqa: PLC0415  # an optional package
        from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: PLC0415

        model = AutoModelForCausalLM.from_pretrained(
            job.model_dir, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(job.model_dir, local_files_only=True)
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=_loader(job.tokens),
            recipe=GPTQModifier(config_groups={"all": _scheme(job)}, ignore=["lm_head"]),
            max_seq_length=job.tokens.shape[1],
            num_calibration_samples=len(job.tokens),
            shuffle_calibration_samples=False,
            pipeline="sequential",
        )
        return {
            name: module.weight.detach().float().cpu()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }


def _scheme(job: PeerJob) -> Any:
    from compressed_tensors.quantization import (  # noqa: PLC0415  # an optional package
        QuantizationArgs,
        QuantizationScheme,
    )

    per_channel = job.grid.group_size == PER_CHANNEL
    weights = QuantizationArgs(
        num_bits=job.grid.bits,
        type="int",
        symmetric=False,
        strategy="channel" if per_channel else "group",
        group_size=None if per_channel else job.grid.group_size,
    )
    activations = QuantizationArgs(
        num_bits=job.a_bits, type="int", symmetric=False, strategy="token", dynamic=True
    )
    return QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=activations if job.has_activations else None,
    )


def _loader(tokens: torch.Tensor) -> DataLoader[Any]:
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    return DataLoader(rows, batch_size=1, shuffle=False)  # type: ignore[arg-type]  # a list will do
