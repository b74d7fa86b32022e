"""What a captured decoding step reads and writes, always in the same places.

A graph has one shape. Rows are padded to a power of two from 16 on and tokens to a multiple of 64,
so that few shapes come about. Rows of padding see nothing but themselves, and nobody sees them.
Shapes: B rows with padding, R real ones, T tokens with padding, H key heads, E head size, P places
of a group's rows with padding, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer

from crl_exp.generation.controller import Action, StepContext
from crl_exp.generation.grouping import ControllerGroup
from crl_exp.generation.row_memory import Memory
from crl_exp.models.kv_cache import RoomyLayer, Running

TOKENS = 64
FEWEST_ROWS = 16
"""With fewer, reading the weights takes as long: another graph would bring nothing."""


def padded_rows(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def frame_rows(n: int) -> int:
    """Of the frame that holds n rows."""
    return max(FEWEST_ROWS, padded_rows(n))


def padded_tokens(n: int) -> int:
    return -(-n // TOKENS) * TOKENS


class FrameLayer(StaticLayer):
    """One layer's keys and values [B, H, T, E], written at a column that all layers share.

    Also where the model attends to a window: the mask leaves out what lies before it.
    """

    def __init__(self, held_2BHTE: Tensor, column_1: Tensor):
        super().__init__(held_2BHTE.shape[3])
        self.keys, self.values = held_2BHTE[0], held_2BHTE[1]
        self.dtype, self.device = held_2BHTE.dtype, held_2BHTE.device
        self.is_initialized, self.column_1 = True, column_1

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Write one token and return all columns. Called by the model's attention."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.column_1, key_states)
        self.values.index_copy_(2, self.column_1, value_states)
        return self.keys, self.values


class Frame:
    """Tokens, positions, mask and cache of a batch."""

    def __init__(
        self, heads_L: Sequence[tuple[int, int]], n_rows: int, n_tokens: int,
        dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        self.n_rows, self.n_tokens = n_rows, n_tokens
        self.token_B = torch.zeros(n_rows, dtype=torch.long, device=device)
        self.position_B = torch.zeros_like(self.token_B)
        self.key_BT = torch.zeros(n_rows, n_tokens, dtype=torch.long, device=device)
        self.valid_BT = torch.zeros(n_rows, n_tokens, dtype=torch.bool, device=device)
        self.column_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.token_index = torch.zeros((), dtype=torch.long, device=device)
        self.held_L = [
            torch.zeros(2, n_rows, n_heads, n_tokens, size, dtype=dtype, device=device)
            for n_heads, size in heads_L
        ]
        self.cache = Cache(layers=[FrameLayer(held, self.column_1) for held in self.held_L])

    def tensors(self) -> list[Tensor]:
        small = [self.token_B, self.position_B, self.key_BT, self.valid_BT, self.column_1]
        keys_values = [
            held
            for layer in self.cache.layers
            if isinstance(layer, FrameLayer)
            for held in (layer.keys, layer.values)
            if held is not None
        ]
        return [*small, self.token_index, *keys_values]

    def fill(self, now: Running, token_index: int) -> None:
        """Take over rows whose next token comes at `token_index`."""
        n, width = now.key_RT.shape
        held_L = [layer.held for layer in now.cache.layers if isinstance(layer, RoomyLayer)]
        self._put(now.token_R, now.position_R, now.key_RT, now.valid_RT)
        for mine, theirs in zip(self.held_L, held_L, strict=True):
            mine[:, :n, :, :width] = theirs[:, :, :, :width]
        self.column_1.fill_(width)
        self.token_index.fill_(token_index)

    def move(self, other: Frame, index_R: Tensor) -> None:
        """Take over these rows of another frame of as many tokens."""
        self._put(
            other.token_B[index_R], other.position_B[index_R], other.key_BT[index_R],
            other.valid_BT[index_R],
        )  # fmt: skip
        for mine, theirs in zip(self.held_L, other.held_L, strict=True):
            mine[:, : len(index_R)] = theirs[:, index_R]
        self.column_1.copy_(other.column_1)
        self.token_index.copy_(other.token_index)

    def _put(self, token_R: Tensor, position_R: Tensor, key_RT: Tensor, valid_RT: Tensor) -> None:
        n, width = key_RT.shape
        for mine, theirs in ((self.token_B, token_R), (self.position_B, position_R)):
            mine.zero_()
            mine[:n] = theirs
        self.valid_BT.zero_()
        self.key_BT[:n, :width], self.valid_BT[:n, :width] = key_RT, valid_RT


class GroupBuffers:
    """A group's rows, memory and team within a frame. Each member has as many places."""

    def __init__(self, group: ControllerGroup, n_rows: int, device: torch.device):
        assert group.team is not None
        self.layer, self.most = group.layer, min(padded_rows(max(group.sizes)), n_rows)
        self.sizes = [self.most] * len(group.sizes)
        n_places = sum(self.sizes)
        self.team = group.team.captured()
        self.row_P = torch.zeros(n_places, dtype=torch.long, device=device)
        self.place_B = torch.zeros(n_rows, dtype=torch.long, device=device)
        # Another layer's memory, in the same context, is that layer's place's.
        self.memory = {
            name: held.new_zeros(n_places, *held.shape[1:])
            for name, held in Memory.of(group.layer, group.context).held().items()
        }

    @staticmethod
    def setting(group: ControllerGroup, n_rows: int) -> tuple:
        """Of two places with the same, the tensors alone differ."""
        assert group.team is not None
        memory = Memory.of(group.layer, group.context).held()
        notes = [(name, held.shape[1:]) for name, held in memory.items()]
        most = min(padded_rows(max(group.sizes)), n_rows)
        return group.layer, group.team.setting, most, tuple(notes)

    def tensors(self) -> list[Tensor]:
        return [self.row_P, self.place_B, *self.team.tensors(), *self.memory.values()]

    def fill(self, group: ControllerGroup, rows: Sequence[slice]) -> None:
        """Take over a group. rows: of the batch, each member's."""
        assert group.team is not None
        self.team.take(group.team)
        own_P = self._own(group.sizes)
        row_N = torch.cat([torch.arange(one.start, one.stop) for one in rows]).to(own_P.device)
        self.row_P.fill_(rows[0].start)
        self.row_P[own_P] = row_N
        self.place_B.fill_(len(self.row_P))  # one past the last: nothing is added
        self.place_B[row_N] = own_P
        memory = Memory.of(self.layer, group.context)
        for name, held in self.memory.items():
            held.zero_()
            held[own_P] = getattr(memory, name)

    def release(self, group: ControllerGroup) -> None:
        """Give the group its memory back."""
        own_P, memory = self._own(group.sizes), Memory.of(self.layer, group.context)
        for name, held in self.memory.items():
            setattr(memory, name, held[own_P])

    def _own(self, sizes: Sequence[int]) -> Tensor:
        own = [torch.arange(size) + i * self.most for i, size in enumerate(sizes)]
        return torch.cat(own).to(self.row_P.device)

    def act(self, x_BD: Tensor, token_index: Tensor) -> tuple[Tensor, Action]:
        """What is added to each row of the frame [B, D], and the action at each place."""
        x_PD = x_BD[self.row_P]
        alive_P = torch.ones_like(self.row_P, dtype=torch.bool)
        context = StepContext(0, [], alive_P, {}, None, self.row_P, len(x_PD))
        context.token_index = token_index  # type: ignore[assignment]
        memory = Memory.of(self.layer, context)
        for name, held in self.memory.items():
            # A copy: what is recorded of this token mustn't change when it is written to below.
            setattr(memory, name, held.clone())
        action = self.team.act(x_PD, context, self.sizes)
        for name, held in self.memory.items():
            held.copy_(getattr(memory, name))
        nothing_1D = torch.zeros_like(action.delta_BD[:1])
        return torch.cat([action.delta_BD, nothing_1D])[self.place_B], action
