"""Controllers that act in one go at a layer, and where their rows lie meanwhile.

Shapes: G members, R rows of the member that has most, N rows of all.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crl_exp.controllers.base import Action, Controller, StepContext


class Team:
    """Controllers of one kin at one layer, made for one call of the engine: within it, what is
    learned doesn't change.

    setting: of two teams with the same, the `tensors` alone differ.
    """

    setting: Hashable

    def act(self, x_ND: Tensor, context: StepContext, sizes: Sequence[int]) -> Action:
        """Decide for the rows of all members, one member's after another's: a function of tensors,
        of which `context.token_index` may be one.

        sizes: rows of each. context: of all these rows.
        """
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """All that this team decides by and another of its setting may have otherwise."""
        raise NotImplementedError

    def captured(self) -> Team:
        """The same with tensors of its own, for a graph that reads them at fixed addresses."""
        raise NotImplementedError

    def take(self, other: Team) -> None:
        """Decide as another team of this setting does."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


@dataclass
class Places:
    """Rows of several members [N], and the same with room for as many of each [G, R].

    most: R. padded_GR: row of each place, any row where a member has fewer. flat_N: place of each
    row. Both None where every member has as many rows.
    """

    n_members: int
    most: int
    padded_GR: Tensor | None
    flat_N: Tensor | None

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> Places:
        most = max(sizes)
        if min(sizes) == most:
            return cls(len(sizes), most, None, None)
        size_G1 = torch.tensor(sizes)[:, None]
        step_R = torch.arange(most)
        own_GR = step_R < size_G1
        padded_GR = torch.where(own_GR, size_G1.cumsum(0) - size_G1 + step_R, 0)
        flat_N = own_GR.flatten().nonzero()[:, 0]
        return cls(len(sizes), most, padded_GR.to(device), flat_N.to(device))

    def padded(self, tensor_N: Tensor) -> Tensor:
        """[N, …] as [G, R, …]."""
        if self.padded_GR is None:
            return tensor_N.unflatten(0, (self.n_members, self.most))
        return tensor_N[self.padded_GR]

    def flat(self, tensor_GR: Tensor) -> Tensor:
        """[G, R, …] as [N, …]."""
        tensor = tensor_GR.flatten(0, 1)
        return tensor if self.flat_N is None else tensor[self.flat_N]


class Teams:
    """The teams of one call of the engine: weights are stacked once, not for each token."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, ...], Team] = {}
        self.kins: dict[tuple[int, int], Hashable | None] = {}

    def kin(self, controller: Controller, layer: int) -> Hashable | None:
        """`Controller.kin`, asked once. The call's jobs keep the controllers alive."""
        place = (id(controller), layer)
        if place not in self.kins:
            self.kins[place] = controller.kin(layer)
        return self.kins[place]

    def of(self, members: Sequence[Controller], layer: int) -> Team | None:
        """None where the one member acts by itself."""
        if self.kin(members[0], layer) is None:
            return None
        who = (layer, *(id(member) for member in members))
        if who not in self.made:
            self.made[who] = members[0].team(members, layer)
        return self.made[who]


def sized(tensor_G: Tensor, sizes: Sequence[int]) -> Tensor:
    """Each member's entry for each of its rows: [G, …] as [N, …]."""
    if min(sizes) == max(sizes):
        return tensor_G[:, None].expand(-1, sizes[0], *tensor_G.shape[1:]).flatten(0, 1)
    counts_G = torch.tensor(sizes, device=tensor_G.device)
    return tensor_G.repeat_interleave(counts_G, dim=0, output_size=sum(sizes))
