"""A checkpoint as it is served: token batches in, logits out, keys and values in pages.

One decoder for every family, arranged by the family's table (`engine.families.decoding`): on a GPU
by the kernels of `kernels` (`engine.inference.decoder.gpu` counts the launches), on a CPU by plain
torch.

Shape legend: M tokens, R rows of logits, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from engine.checkpoint.reader import LoadedModel
from engine.inference.decoder.batch import TokenBatch
from engine.inference.decoder.building import build_layers
from engine.inference.decoder.cpu import CpuDevice
from engine.inference.decoder.device import Device
from engine.inference.decoder.end_building import build_ends
from engine.inference.decoder.ends import Entry, Exit
from engine.inference.decoder.gpu import GpuDevice
from engine.inference.decoder.layers import Layer
from kernels.kv_pages import RAW_DTYPES, KvPages
from kernels.overlap import can_overlap

__all__ = ["Decoder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSizes:
    """What a runner has to know."""

    vocabulary: int
    layers: int
    kv_heads: int
    head_dim: int
    context_length: int


class Decoder:
    """Weights of one model and the order in which they are applied."""

    def __init__(
        self,
        sizes: DecoderSizes,
        entry: Entry,
        layers: Sequence[Layer],
        exit_: Exit,
        placed: Device,
        like: torch.Tensor,
    ) -> None:
        self.vocabulary, self.layers = sizes.vocabulary, sizes.layers
        self.kv_heads, self.head_dim = sizes.kv_heads, sizes.head_dim
        self.context_length = sizes.context_length
        self.device, self.dtype = like.device, like.dtype
        self._entry, self._layers, self._exit = entry, tuple(layers), exit_
        self._placed = placed

    @classmethod
    def from_loaded(
        cls,
        loaded: LoadedModel,
        head_bits: int | None = None,
        *,
        positions: int | None = None,
        launch_pdl: bool = False,
    ) -> Self:
        """Take the weights out of a loaded model, which is left empty.

        Args:
            loaded: on its device; `load_checkpoint(..., prepares=False)` spares what is derived
                twice. float16 or bfloat16 on a GPU.
            head_bits: 8 or 4 rounds the output head; None keeps it.
            positions: tokens of a sequence, where fewer than the model's context will do.
            launch_pdl: let kernels start while others still run, where they and the GPU offer it.

        Raises:
            UnsupportedModel: if the device lacks what the family needs.
            ValueError: if `head_bits` or the dtype is none that is known.
        """
        embedding = loaded.model.get_parameter(loaded.architecture.embedding_name)
        placed = _device_of(embedding, launch_pdl=launch_pdl)
        return cls.build(loaded, placed, head_bits=head_bits, positions=positions)

    @classmethod
    def build(
        cls,
        loaded: LoadedModel,
        placed: Device,
        *,
        head_bits: int | None = None,
        positions: int | None = None,
    ) -> Self:
        """Build for a given device; see `from_loaded`."""
        architecture = loaded.architecture
        like = loaded.model.get_parameter(architecture.embedding_name)
        longest = architecture.max_positions
        context = longest if positions is None else min(positions, longest)
        with torch.inference_mode():
            layers = list(build_layers(loaded, placed, context))
            ends = build_ends(loaded, placed, head_bits)
        sizes = DecoderSizes(
            vocabulary=architecture.vocab,
            layers=architecture.layers,
            kv_heads=architecture.kv_heads,
            head_dim=architecture.head_dim,
            context_length=context,
        )
        return cls(sizes, ends.entry, layers, ends.exit_, placed, like)

    @property
    def weight_bytes(self) -> int:
        """Bytes of linears, embeddings and head; a head that is the embedding counts once."""
        ends = self._entry.nbytes + self._exit.nbytes
        return ends + sum(each.nbytes for each in self._layers)

    @property
    def chunks_wait(self) -> bool:
        """Whether chunks of prompts wait for the host: those of experts do."""
        return any(each.chunks_wait for each in self._layers)

    def new_pages(self, pages: int, *, kv_bits: int, page_size: int = 16) -> tuple[KvPages, ...]:
        """Allocate the cache of every layer.

        Args:
            pages: of one layer.
            kv_bits: 2..8, or 16 for states as they are.
            page_size: tokens of a page, a power of two from 16 on.

        Raises:
            ValueError: if the device's kernels cannot read such pages.
        """
        return tuple(
            self._placed.new_pages(
                pages, self.kv_heads, self.head_dim, kv_bits=kv_bits, page_size=page_size
            )
            for _ in range(self.layers)
        )

    @torch.inference_mode()
    def forward(self, batch: TokenBatch, pages: Sequence[KvPages]) -> torch.Tensor:
        """Append the tokens of a batch to the pages and give the logits that are wanted.

        On a GPU nothing waits for the host and no shape depends on data, so the whole can be
        recorded in a CUDA graph; with experts, chunks wait for the router unless it is recorded.
        Tokens behind the last chunk are no sequence's: what they hold reaches no other.

        Args:
            batch: M tokens.
            pages: of every layer.

        Returns:
            ``[R, V]``, float32 or the dtype of the stream.
        """
        stream = self._entry.run(self._placed, batch)
        for layer, own in zip(self._layers, pages, strict=True):
            stream = layer.run(self._placed, stream, batch, own)
        return self._exit.run(self._placed, stream.rows(batch.logit_rows))


def _device_of(like: torch.Tensor, *, launch_pdl: bool) -> Device:
    if like.device.type == "cpu":
        return CpuDevice(like.dtype)
    if like.dtype not in RAW_DTYPES:
        raise ValueError(f"dtype = {like.dtype}: a GPU runs float16 or bfloat16")
    can_start_early = can_overlap(like.device.index)
    return GpuDevice(like.device, like.dtype, launch_pdl=launch_pdl and can_start_early)
