"""Tables of positions: the turns of rotary embeddings and the biases of ALiBi, by the model itself.

Shape legend: P positions, R rotated dims of a head, Q query heads.
"""

import math
from typing import Any

import torch
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from engine.checkpoint.reader import LoadedModel
from engine.errors import UnsupportedModel
from kernels.rotary import RotaryTable

__all__ = ["PositionTables"]


class PositionTables:
    """Tables of one model, each made once; layers of a kind share theirs."""

    def __init__(self, loaded: LoadedModel, positions: int) -> None:
        self._loaded, self._positions = loaded, positions
        self._rotary: dict[str, RotaryTable] = {}
        self._biases: torch.Tensor | None = None

    def rotary(self, layer: int) -> RotaryTable:
        """The turns of a layer: float32 ``[P, R / 2]``, frequencies scaled as the model does."""
        stack = self._loaded.architecture.family.layers.rpartition(".")[0]
        rotary: Any = self._loaded.model.get_submodule(f"{stack}.rotary_emb")
        # models whose layers turn by different bases ask for the kind of the layer
        by_kind = hasattr(rotary, "layer_types")
        config: Any = self._loaded.model.config
        kind = config.layer_types[layer] if by_kind else ""
        if kind not in self._rotary:
            places = torch.arange(self._positions, device=self._device).unsqueeze(0)
            like = torch.zeros((), device=self._device)
            cos, sin = rotary(like, places, **({"layer_type": kind} if by_kind else {}))
            half = cos.shape[-1] // 2
            self._rotary[kind] = RotaryTable(
                cos=cos[0, :, :half].contiguous(), sin=sin[0, :, :half].contiguous()
            )
        return self._rotary[kind]

    def biases(self) -> torch.Tensor:
        """What ALiBi adds to the scores of each key: float32 ``[Q, P]``.

        Raises:
            UnsupportedModel: on a GPU, whose kernels add nothing.
        """
        if self._device.type != "cpu":
            raise UnsupportedModel(
                "alibi", "alibi = True is not supported on a GPU: run the model on a CPU"
            )
        if self._biases is None:
            architecture = self._loaded.architecture
            seen = torch.ones(1, self._positions, dtype=torch.long)
            slopes = build_alibi_tensor(seen, architecture.heads, torch.float32)
            self._biases = slopes[:, 0] / math.sqrt(architecture.head_dim)
        return self._biases

    @property
    def _device(self) -> torch.device:
        return next(self._loaded.model.parameters()).device
