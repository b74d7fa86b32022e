"""Keys and values of the rows that are being decoded.

Shapes: B rows, R rows that stay, H key heads, T tokens, E head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values with room for the answer, written in place.

    transformers' DynamicLayer copies everything at each token.
    """

    def __init__(self, held_2BHTE: Tensor, n_tokens: int):
        super().__init__()
        self.lazy_initialization(held_2BHTE[0], held_2BHTE[1])
        self.held, self.n_tokens = held_2BHTE, n_tokens
        self._show()

    def _show(self) -> None:
        self.keys, self.values = self.held[:, :, :, : self.n_tokens]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and values, as views. Called by the model's attention."""
        end = self.n_tokens + key_states.shape[2]
        assert end <= self.held.shape[3], "more tokens than there is room for"
        self.held[0, :, :, self.n_tokens : end] = key_states
        self.held[1, :, :, self.n_tokens : end] = value_states
        self.n_tokens = end
        self._show()
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def keep(self, index_R: Tensor, first_token: int) -> None:
        """Only these rows stay, and of the tokens those from `first_token` on."""
        self.held = self.held[:, index_R.to(self.held.device), :, first_token:]
        self.n_tokens -= first_token
        self._show()


def keep_rows(cache: DynamicCache, index_R: Tensor, first_token: int) -> None:
    """`RoomyLayer.keep` for every layer that is in use."""
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep(index_R, first_token)


@dataclass
class Running:
    """What the next forward pass starts from."""

    token_R: Tensor
    position_R: Tensor
    key_RT: Tensor
    valid_RT: Tensor
    cache: DynamicCache

    def step(self) -> None:
        """Make room in the mask for the token that is fed next."""
        self.key_RT = torch.cat([self.key_RT, self.position_R[:, None]], dim=1)
        true_R1 = self.valid_RT.new_ones(len(self.valid_RT), 1)
        self.valid_RT = torch.cat([self.valid_RT, true_R1], dim=1)

    def keep(self, index_R: Tensor) -> None:
        """Only these rows stay, and no column that is padding in all of them."""
        self.token_R, self.position_R = self.token_R[index_R], self.position_R[index_R]
        valid_RT = self.valid_RT[index_R]
        first = int(valid_RT.any(dim=0).int().argmax())
        self.key_RT, self.valid_RT = self.key_RT[index_R, first:], valid_RT[:, first:]
        keep_rows(self.cache, index_R, first)


def keys_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, each [B, H, T, E], of every layer that has been run."""
    found = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None and layer.values is not None
        found.append((layer.keys, layer.values))
    return found


class Scratch:
    """Memory for the keys and values of one batch, used again by the next.

    On a CPU only: what is freed there goes back to the system, and to be given as much anew takes
    longer than to fill it. A GPU's allocator keeps it.
    """

    def __init__(self) -> None:
        self.flat: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.flat.values())

    def gathered(self, layer: int, kv_N2HE: Tensor, row_M: Tensor) -> Tensor:
        """These rows [M, 2, H, E]; what was gathered for the layer before is written over."""
        if kv_N2HE.is_cuda:
            return kv_N2HE.index_select(0, row_M)
        shape = (len(row_M), *kv_N2HE.shape[1:])
        there, needed = self.flat.get(layer), math.prod(shape)
        like = there is not None and (there.dtype, there.device) == (kv_N2HE.dtype, kv_N2HE.device)
        if there is None or not like or there.numel() < needed:
            self.flat.pop(layer, None)  # before there is another
            self.flat[layer] = there = kv_N2HE.new_empty(needed)
        return torch.index_select(kv_N2HE, 0, row_M, out=there[:needed].view(shape))


def assembled(
    kv_L: list[Tensor], first_layer: int, with_last: int, rows: Tensor, room: int, scratch: Scratch
) -> DynamicCache:
    """A fresh cache of the layers from `first_layer` up, gathered from stored tokens.

    kv_L: each layer's store [N, 2, H, E]. rows: of it, [B, T]; layers below `with_last` take all,
    the others leave out the last token. room: tokens that will be appended. scratch: of which the
    cache is made, so that it is good until the next one is.
    """
    cache = DynamicCache()
    for index, kv_N2HE in enumerate(kv_L):
        if index < first_layer:
            cache.layers.append(DynamicLayer())
            continue
        n_tokens = rows.shape[1] - (index >= with_last)
        # What lies in the room is written over; gathered along, nothing has to be copied again.
        tokens = torch.cat([rows[:, :n_tokens], rows[:, :1].expand(-1, room)], dim=1)
        kv = scratch.gathered(index, kv_N2HE, tokens.reshape(-1).to(kv_N2HE.device))
        kv = kv.view(*tokens.shape, *kv.shape[1:]).permute(2, 0, 3, 1, 4)
        cache.layers.append(RoomyLayer(kv, n_tokens))
    return cache
