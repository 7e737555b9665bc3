"""How `kernels.prefill_linear` is launched."""

from dataclasses import dataclass

__all__ = ["PrefillConfig", "prefill_configs"]

SHARED_BYTES = 227 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """Tile and launch parameters of one launch."""

    block_m: int
    """64, 128 or 256 tokens."""
    block_n: int
    """128 or 256 outputs."""
    block_k: int
    """Columns of one product, 32, 64 or 128; a stored slice is cut to it."""
    stages: int
    num_warps: int = 8
    group_m: int = 8
    """Tiles of tokens walked before the next tile of weights."""
    programs: int = 132
    """One for each multiprocessor, or a multiple where registers and shared memory allow it."""

    def shared_bytes(self, field_bits: tuple[int, ...]) -> int:
        """Shared memory of the stages."""
        turn = 8 // field_bits[-1]
        runs = sum(field_bits) * turn // 8
        return self.stages * self.block_k * (runs * self.block_n + turn * self.block_m)


def prefill_configs(field_bits: tuple[int, ...], slice_bytes: int) -> list[PrefillConfig]:
    """Launches worth timing for a width, best guess first.

    One stage too few shows as waiting for bytes; wide products mean fewer turns.
    """
    shapes = [(128, 256), (256, 128), (128, 128), (64, 256)]
    found = []
    for block_m, block_n in shapes:
        for block_k in (128, 64, 32):
            if block_k > slice_bytes:
                continue
            for stages in (4, 3, 2):
                config = PrefillConfig(
                    block_m=block_m, block_n=block_n, block_k=block_k, stages=stages
                )
                # results change their layout in shared memory too
                if config.shared_bytes(field_bits) + 24 * 1024 <= SHARED_BYTES:
                    found.append(config)
                    break
    return sorted(found, key=lambda c: (shapes.index((c.block_m, c.block_n)), c.stages < 3))
