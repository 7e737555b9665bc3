"""Orthonormal Hadamard transforms of the last dimension.

    y = x H / sqrt(block)        H = kron(H(p), H(q)), p q = block, over every block of n channels
    y = x diag(signs) H / ...    the rotation of the residual stream

With a block's channels laid out as a matrix ``X[P, Q]``, row after row, x H is ``H(p)^T X H(q)``:
two small dense products instead of one large one. The inverse uses the transposes; Paley's
matrices are not symmetric. Entries of the factors are +1 and -1, exact in every dtype.

A linear layer keeps its function when inputs and weight columns are transformed alike:
``x W^T = (x H) (W H)^T``; and its output is transformed when its rows are: ``y H = x (H^T W)^T``.

Shape legend: P, Q orders of the factors, N rows, K columns.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cache

import torch

from engine.orders import Construction, block_of, construction_of, factors

__all__ = [
    "Factors",
    "factors_of",
    "hadamard",
    "hadamard_matrix",
    "random_signs",
    "rotate_columns",
    "rotate_rows",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The two dense factors of one block."""

    left: torch.Tensor
    """float32 ``[P, P]`` of +1 and -1; never written to."""
    right: torch.Tensor
    """float32 ``[Q, Q]`` of +1 and -1; never written to."""

    @property
    def block(self) -> int:
        """Channels that are mixed."""
        return len(self.left) * len(self.right)


def factors_of(block: int, device: torch.device | str = "cpu") -> Factors:
    """Build the factors of a block; keep them where a transform runs often.

    Raises:
        ValueError: if `block` is no product of two known orders.
    """
    orders = factors(block) if block > 0 else None
    if orders is None:
        raise ValueError(
            f"no Hadamard matrix of order {block} is known here; use {block_of(max(block, 1))}"
        )
    left, right = (hadamard_matrix(order).to(device) for order in orders)
    return Factors(left=left, right=right)


def hadamard(x: torch.Tensor, parts: Factors, *, inverse: bool = False) -> torch.Tensor:
    """Transform every block of channels; differentiable, no host synchronization.

    Args:
        x: float ``[..., K]``; the block divides K. Half precision is computed in float32.
        parts: on the device of ``x``.
        inverse: undo the transform.

    Returns:
        ``[..., K]`` in the dtype of ``x``.

    Raises:
        ValueError: if the block does not divide K.
    """
    k, block = x.shape[-1], parts.block
    if k % block:
        raise ValueError(f"a Hadamard block of {block} does not divide {k} channels")
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    left, right = parts.left.to(dtype), parts.right.to(dtype)
    if inverse:
        left, right = left.T, right.T
    grid = x.to(dtype).reshape(*x.shape[:-1], k // block, len(left), len(right))
    # a transposed product on the right is one matrix product, on the left many small ones
    mixed = ((grid @ right).transpose(-1, -2) @ left).transpose(-1, -2)
    return (mixed.reshape(x.shape) * (1 / math.sqrt(block))).to(x.dtype)


def rotate_columns(
    w_NK: torch.Tensor,
    block: int,
) -> torch.Tensor:
    """Make the weight that reads transformed inputs: ``W H``, in blocks of `block` columns.

    Args:
        w_NK: float ``[N, K]``.
        block: a product of two orders that divides K.
    """
    return hadamard(w_NK, factors_of(block, w_NK.device))


def rotate_rows(w_NK: torch.Tensor, block: int) -> torch.Tensor:
    """Make the weight that writes transformed outputs: ``H^T W``, in blocks of `block` rows.

    Args:
        w_NK: float ``[N, K]``, or a bias ``[N]``.
        block: a product of two orders that divides N.
    """
    return hadamard(w_NK.movedim(0, -1), factors_of(block, w_NK.device)).movedim(-1, 0)


@cache
# what is cached may be differentiated through later, whoever asked first
@torch.inference_mode(mode=False)
def random_signs(n: int, seed: int) -> torch.Tensor:
    """Draw +1 and -1: float32 ``[n]`` on the CPU, equal in every version; never written to.

    Channel i is negative where bit ``i % 8`` of byte ``i // 8`` of SHAKE-256 (FIPS 202) over the
    text ``abq-signs:<n>:<seed>`` is set.
    """
    digest = hashlib.shake_256(f"abq-signs:{n}:{seed}".encode()).digest((n + 7) // 8)
    negative = [digest[i // 8] >> i % 8 & 1 for i in range(n)]
    return 1 - 2 * torch.tensor(negative, dtype=torch.float32, device="cpu")


@cache
@torch.inference_mode(mode=False)
def hadamard_matrix(order: int) -> torch.Tensor:
    """Build a Hadamard matrix: float32 ``[order, order]`` on the CPU; never written to.

    Raises:
        ValueError: if no construction gives this order.
    """
    match construction_of(order):
        case Construction.SYLVESTER:
            return _doubled(order // 2) if order > 1 else torch.ones(1, 1, device="cpu")
        case Construction.PALEY_I:
            return torch.eye(order, device="cpu") + _bordered(order - 1, corner=-1)
        case Construction.PALEY_II:
            return _paley_ii(order // 2 - 1)
        case Construction.DOUBLED:
            return _doubled(order // 2)
        case _:
            raise ValueError(f"no Hadamard matrix of order {order} is known here")


def _doubled(order: int) -> torch.Tensor:
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")
    return torch.kron(pair, hadamard_matrix(order))


def _paley_ii(q: int) -> torch.Tensor:
    conference = _bordered(q, corner=1)
    cross = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], device="cpu")
    return torch.kron(conference, cross) + torch.kron(torch.eye(q + 1, device="cpu"), diagonal)


def _bordered(q: int, corner: int) -> torch.Tensor:
    """Border the quadratic residues: a first row of ones, a first column of `corner`, 0 between."""
    squares = {i * i % q for i in range(1, q)}
    residue = [0] + [1 if i in squares else -1 for i in range(1, q)]
    rows = [[residue[(i - j) % q] for j in range(q)] for i in range(q)]
    bordered = [[0, *[1] * q], *([corner, *row] for row in rows)]
    return torch.tensor(bordered, dtype=torch.float32, device="cpu")
