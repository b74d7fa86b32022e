"""Keys and values of the rows that are being decoded.

Shapes: B rows, R rows that stay, H key heads, T tokens, E head size.
"""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values with room for the answer, written in place.

    transformers' DynamicLayer copies everything at each token.
    """

    def __init__(self, kv_2BHTE: Tensor, room: int):
        super().__init__()
        self.lazy_initialization(kv_2BHTE[0], kv_2BHTE[1])
        self.n_tokens = kv_2BHTE.shape[3]
        shape = list(kv_2BHTE.shape)
        shape[3] += room
        self.held = kv_2BHTE.new_empty(shape)
        self.held[:, :, :, : self.n_tokens] = kv_2BHTE
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
        self.held = self.held[:, index_R, :, first_token:]
        self.n_tokens -= first_token
        self._show()


def keep_rows(cache: DynamicCache, index_R: Tensor, first_token: int) -> None:
    """`RoomyLayer.keep` for every layer that is in use."""
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep(index_R, first_token)


def keys_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, each [B, H, T, E], of every layer that has been run."""
    found = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None and layer.values is not None
        found.append((layer.keys, layer.values))
    return found


def assembled(kv_L: list[Tensor], first_layer: int, with_last: int, rows: Tensor, room: int):
    """A fresh cache of the layers from `first_layer` up, gathered from stored tokens.

    kv_L: each layer's store [N, 2, H, E]. rows: of it, [B, T]; layers below `with_last` take all,
    the others leave out the last token. room: tokens that will be appended.
    """
    cache = DynamicCache()
    for index, kv_N2HE in enumerate(kv_L):
        if index < first_layer:
            cache.layers.append(DynamicLayer())
            continue
        tokens = rows if index < with_last else rows[:, :-1]
        kv = kv_N2HE[tokens.reshape(-1)]
        kv = kv.view(*tokens.shape, *kv.shape[1:]).permute(2, 0, 3, 1, 4)
        cache.layers.append(RoomyLayer(kv, room))
    return cache
