"""Random numbers that belong to a row, not to the batch that the row happens to lie in.

Counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): each number is a
hash of the rollout's seed and of its own place. So an answer's exploration is the same whatever is
generated beside it: alone or packed, in large or small batches, with finished rows left out.
Shapes: B rows, N numbers a row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: splitmix64's step from one number to the next."""


class RowRandom:
    """Numbers for one layer and token of a rollout; each call gives new ones.

    seed: of the rollout. row_B: each row's position among its job's items; in an evaluation its
    item's in the split, so that neither the parts a split is answered in nor their size matter.
    """

    def __init__(self, seed: int, row_B: Tensor, layer: int = 0, token_index: int | Tensor = 0):
        self.key_B = _later(layer_keys(seed, row_B, layer), token_index)

    @classmethod
    def at(cls, key_B: Tensor, token_index: Tensor) -> RowRandom:
        """Of rows that may belong to several rollouts. key_B: `layer_keys`. token_index: []."""
        draws = cls.__new__(cls)
        draws.key_B = _later(key_B, token_index)
        return draws

    @classmethod
    def again(cls, key_B: Tensor) -> RowRandom:
        """The same numbers once more. key_B: as it was before any of them was drawn."""
        draws = cls.__new__(cls)
        draws.key_B = key_B
        return draws

    def uniform(self, n: int) -> Tensor:
        """[B, N], evenly between 0 and 1 and never either of them."""
        self.key_B = _mix(self.key_B + _signed(GOLDEN))
        hashed_BN = _stepped_as_one(self.key_B, n) if _capturing else _stepped(self.key_B, n)
        # The 23 highest bits and a half: exact in float32, where 24 bits and a half would give 1.
        return (((hashed_BN >> 41) & 0x7FFFFF).float() + 0.5) * 2.0**-23

    def gumbel(self, n: int) -> Tensor:
        """[B, N] of the standard Gumbel distribution, −log(−log u)."""
        return -(-self.uniform(n).log()).log()

    def normal(self, n: int) -> Tensor:
        """[B, N] of mean 0 and deviation 1 (Box and Muller 1958)."""
        radius_BN = (-2 * self.uniform(n).log()).sqrt()
        return radius_BN * (2 * math.pi * self.uniform(n)).cos()


def own_seed(use: str, seed: int, layer: int) -> int:
    """The seed of something drawn once a run and layer (a direction, a random feature).

    Of another run's layer it is another one, so that runs at single layers don't share a draw.
    """
    digest = hashlib.sha256(f"{use} {seed} {layer}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def layer_keys(seed: int, row_B: Tensor, layer: int) -> Tensor:
    """What all numbers of a rollout's rows at one layer are made from [B], whatever the token."""
    return _mix(_mix(row_B.long() + _signed(seed * GOLDEN)) + _signed((layer + 1) * GOLDEN))


def option_keys(key_B: Tensor, option_B: Tensor) -> Tensor:
    """`layer_keys` of rows that read one option each, so that the options of a row don't explore
    alike."""
    return _mix(key_B + (option_B.long() + 1) * _signed(3 * GOLDEN))


def _later(key_B: Tensor, token_index: int | Tensor) -> Tensor:
    if isinstance(token_index, int):
        return _mix(key_B + _signed((token_index + 1) * GOLDEN))
    return _mix(key_B + (token_index.long() + 1) * _signed(GOLDEN))  # the same modulo 2^64


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014), in int64 arithmetic that wraps around."""
    return _mix_as_one(x) if _capturing else _mixed(x)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _stepped(x: Tensor, n: int) -> Tensor:
    """n hashes [.., N] of each number, splitmix64's steps after it."""
    return _mixed(x[..., None] + torch.arange(1, n + 1, device=x.device) * _signed(GOLDEN))


_capturing = False


@contextmanager
def capturing() -> Iterator[None]:
    """While a graph is recorded that is to be compiled: `_mix` and `_stepped` are then one operator
    of it each.

    torch.compile would write the first into one expression, which doubles with each of its lines:
    three in a row took the compiler more than six minutes. Of the second it makes code that on a
    CPU with AVX2 alone is wrong in the numbers that don't fill a vector (torch 2.13). Called by
    themselves the operators are slow.
    """
    global _capturing
    _capturing = True
    try:
        yield
    finally:
        _capturing = False


@torch.library.custom_op("crl_exp::mix", mutates_args=())
def _mix_as_one(x: Tensor) -> Tensor:
    return _mixed(x)


@_mix_as_one.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_mix_as_one.register_vmap
def _(info, in_dims: tuple, x: Tensor) -> tuple[Tensor, int]:
    return _mix_as_one(x), in_dims[0]


@torch.library.custom_op("crl_exp::stepped", mutates_args=())
def _stepped_as_one(x: Tensor, n: int) -> Tensor:
    return _stepped(x, n)


@_stepped_as_one.register_fake
def _(x: Tensor, n: int) -> Tensor:
    return x.new_empty((*x.shape, n))


@_stepped_as_one.register_vmap
def _(info, in_dims: tuple, x: Tensor, n: int) -> tuple[Tensor, int]:
    return _stepped_as_one(x, n), in_dims[0]


def _signed(x: int) -> int:
    """A whole number, modulo 2^64, as int64 holds it."""
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x
