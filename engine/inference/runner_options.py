"""Sizes of a runner; no tensors."""

from dataclasses import dataclass

from engine.inference.memory_plan import chunk_buckets, decode_buckets

__all__ = ["RunnerOptions"]

CPU_PAGES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """How much a runner takes on at a time, and how much memory for it."""

    kv_bits: int = 16
    """2..8, or 16."""
    max_sequences: int = 64
    max_step_tokens: int = 2048
    """Tokens of chunks in one step; decoding sequences come on top."""
    draft_tokens: int = 0
    """Guesses of a sequence in one step: each has logits, for which memory is kept."""
    page_size: int = 16
    context_length: int | None = None
    """Tokens of a sequence at most; None for the model's context, as far as the pages go."""
    memory_fraction: float = 0.9
    """Of the memory that is free on a GPU once weights are loaded, for pages, graphs, workspace."""
    kv_bytes: int | None = None
    """For keys and values, instead of what `memory_fraction` leaves."""
    pages: int | None = None
    """Overrides both; on a CPU 1024 where neither it nor `kv_bytes` is given."""
    use_graphs: bool = True
    """Whether a GPU replays steps; without, it runs the same launch by launch."""
    buckets: tuple[int, ...] | None = None
    """Batch sizes that decode steps are filled up to; None for the usual ones on a GPU, for none on
    a CPU."""
    chunk_graphs: bool = True
    """Whether steps that are chunks of prompts alone are filled up and replayed too."""
    chunk_buckets: tuple[int, ...] | None = None
    """Numbers of tokens that they are filled up to, larger ones not at all; None as for
    `buckets`."""

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} is not possible: use at least 1")
        # written so that NaN fails too
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(
                f"memory_fraction = {self.memory_fraction} is not possible: use more than 0 and at"
                " most 1"
            )
        if self.chunk_buckets and (
            list(self.chunk_buckets) != sorted(set(self.chunk_buckets))
            or not 1 <= self.chunk_buckets[0] <= self.chunk_buckets[-1] <= self.max_step_tokens
        ):
            raise ValueError(
                f"chunk_buckets = {self.chunk_buckets} are not possible: use rising numbers up to"
                f" max_step_tokens = {self.max_step_tokens}"
            )
        if self.buckets and (
            list(self.buckets) != sorted(set(self.buckets))
            or self.buckets[-1] != self.max_sequences
        ):
            raise ValueError(
                f"buckets = {self.buckets} are not possible: use rising sizes that end with"
                f" max_sequences = {self.max_sequences}"
            )

    def buckets_on(self, device_type: str) -> tuple[int, ...]:
        """Batch sizes of decode steps on a `cuda` or `cpu` device."""
        if self.buckets is not None:
            return self.buckets
        return decode_buckets(self.max_sequences) if device_type == "cuda" else ()

    def chunk_buckets_on(self, device_type: str) -> tuple[int, ...]:
        """Numbers of tokens of steps that are chunks alone, on a `cuda` or `cpu` device."""
        if not self.chunk_graphs:
            return ()
        if self.chunk_buckets is not None:
            return self.chunk_buckets
        return chunk_buckets(self.max_step_tokens) if device_type == "cuda" else ()
