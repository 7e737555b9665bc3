"""AutoRound (signed gradient descent on rounding and clips), from the package `auto-round`.

Its own defaults, mixed precision on a GPU included, but for the data: the calibration windows that
our recipes get.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typing_extensions import override

from benchmarks.peers.base import Peer, PeerJob

__all__ = ["AutoRoundPeer"]

BATCH = 8
"""Windows of a training step: the package's default."""
WRAPPED = "orig_layer"
"""Where the package keeps a linear whose inputs it rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRoundPeer(Peer):
    """AutoRound."""

    default_steps: int | None = None
    """Training steps of a block where the job names none; None takes the package's default."""

    @override
    def quantize(self, job: PeerJob) -> dict[str, torch.Tensor]:
        """Tune rounding block by block."""
        from auto_round import AutoRound  # noqa: PLC0415  # an optional package

        model = AutoModelForCausalLM.from_pretrained(
            job.model_dir, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(job.model_dir, local_files_only=True)
        tuner = AutoRound(
            model,
            tokenizer,
            bits=job.grid.bits,
            group_size=job.grid.group_size,
            sym=False,
            iters=self.default_steps if job.steps is None else job.steps,
            dataset=[row[None] for row in job.tokens],
            nsamples=len(job.tokens),
            seqlen=job.tokens.shape[1],
            batch_size=min(BATCH, len(job.tokens)),
            seed=job.seed,
            device_map=job.device,
            amp=job.device.startswith("cuda"),
            enable_torch_compile=False,
            **_activations(job),
        )
        tuned, _ = tuner.quantize()
        return _weights(tuned)


def _activations(job: PeerJob) -> dict[str, Any]:
    if not job.has_activations:
        return {}
    return {
        "act_bits": job.a_bits,
        "act_group_size": -1,
        "act_sym": False,
        "act_dynamic": True,
        "act_data_type": "int",
    }


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            full_name = name.removesuffix(f".{WRAPPED}")
            found[full_name] = module.weight.detach().float().cpu()
    return found
