"""Who acts at which site for which rows of a batch, and controllers that act in one go.

Controllers of one `batch_key` act as one team, whatever jobs they belong to: no loop over rows or
jobs.
Shapes: B rows of the batch, N rows of a group, D d_model, G members of a team, R rows of the member
that has most.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from crl_exp.generation.controller import Action, Controller, StepContext, Team
from crl_exp.generation.prompt_features import PromptActs
from crl_exp.generation.prompts import PromptBatch


@dataclass
class PaddedRows:
    """Rows of several members [N], and the same with room for as many of each [G, R].

    most: R. padded_GR: row of each place, any row where a member has fewer. flat_N: place of each
    row. Both None where every member has as many rows.
    """

    n_members: int
    most: int
    padded_GR: Tensor | None
    flat_N: Tensor | None

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> PaddedRows:
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
        self.batch_keys: dict[tuple[int, int], Hashable | None] = {}

    def batch_key(self, controller: Controller, layer: int) -> Hashable | None:
        """`Controller.batch_key`, asked once. The call's jobs keep the controllers alive."""
        place = (id(controller), layer)
        if place not in self.batch_keys:
            self.batch_keys[place] = controller.batch_key(layer)
        return self.batch_keys[place]

    def of(self, members: Sequence[Controller], layer: int) -> Team | None:
        """None where the one member acts by itself."""
        if self.batch_key(members[0], layer) is None:
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


@dataclass
class JobRows:
    """A job's rows in one batch: of these positions among its items, which are n_rows in all."""

    controller: Controller
    items: list[int]
    row_B: list[int]
    n_rows: int


def first_site(controller: Controller, n_layers: int) -> int:
    """The first residual that it may change; where it changes none, the last there is."""
    changed = controller.sites.values() if controller.steers else ()
    return min(changed, default=n_layers - 1)


def start_layer(controller: Controller, new_tokens: int, n_layers: int) -> int:
    """The first decoder layer that runs at all: with one token to write, the one after the first
    steered residual."""
    return first_site(controller, n_layers) + 1 if new_tokens == 1 else 0


@dataclass
class ControllerGroup:
    """Parts that act together at one layer.

    rows: of the batch, those of each part one after another. sizes: rows of each part.
    context: of all these rows; where several parts act together, notes of their own.
    """

    layer: int
    parts: list[int]
    team: Team | None
    rows: slice | Tensor
    sizes: list[int]
    context: StepContext

    def slices(self) -> list[slice]:
        """Of the group's rows, each part's."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]


class ControllerGroups:
    """The parts of a batch, each one's rows and notes, and the groups at each site.

    rows: of the rows still in the batch, each part's. contexts: each part's.
    """

    def __init__(
        self, prompt: PromptBatch, parts: list[JobRows], teams: Teams, device: torch.device
    ):
        self.parts, self.teams, self.device = parts, teams, device
        self.rows: list[slice] = []
        self.contexts: list[StepContext] = []
        for part in parts:
            at = self.rows[-1].stop if self.rows else 0
            rows = slice(at, at + len(part.items))
            self.rows.append(rows)
            row_B = torch.tensor(part.row_B, device=device)
            acts, nobody = PromptActs(prompt.store, prompt.items[rows]), torch.empty(0)
            self.contexts.append(
                StepContext(0, list(part.items), nobody, {}, acts, row_B, part.n_rows)
            )
        self.groups = [self._troop(layer, who) for layer, who in self._grouped()]

    def _grouped(self) -> list[tuple[int, list[int]]]:
        """Layer and parts of each group."""
        found: dict[Hashable, tuple[int, list[int]]] = {}
        for index, part in enumerate(self.parts):
            for layer, site in part.controller.sites.items():
                key = self.teams.batch_key(part.controller, layer)
                alike = index if key is None else ("batch_key", key)
                found.setdefault((layer, site, alike), (layer, []))[1].append(index)
        return list(found.values())

    def _troop(self, layer: int, who: list[int]) -> ControllerGroup:
        contexts = [self.contexts[index] for index in who]
        context = contexts[0] if len(who) == 1 else StepContext.joined(contexts)
        team = self.teams.of([self.parts[index].controller for index in who], layer)
        return ControllerGroup(layer, who, team, self._rows(who), self._sizes(who), context)

    def _rows(self, who: list[int]) -> slice | Tensor:
        rows = [self.rows[index] for index in who]
        if all(one.stop == next.start for one, next in pairwise(rows)):
            return slice(rows[0].start, rows[-1].stop)
        at = [torch.arange(one.start, one.stop) for one in rows]
        return torch.cat(at).to(self.device)

    def _sizes(self, who: list[int]) -> list[int]:
        return [len(self.contexts[index].items) for index in who]

    def steers(self, group: ControllerGroup) -> bool:
        return bool(self.parts[group.parts[0]].controller.steers)

    def at(self, steering: bool) -> dict[int, list[ControllerGroup]]:
        """By site, the groups that steer, or those that only look."""
        found: dict[int, list[ControllerGroup]] = {}
        for group in self.groups:
            if self.steers(group) == steering:
                site = self.parts[group.parts[0]].controller.sites[group.layer]
                found.setdefault(site, []).append(group)
        return found

    def act(
        self, group: ControllerGroup, x_ND: Tensor, token_index: int, alive_B: Tensor
    ) -> Action | None:
        """What the group does. alive_B: of the rows still in the batch."""
        context = group.context
        context.token_index, context.alive_B = token_index, alive_B[group.rows]
        if group.team is not None:
            return group.team.act(x_ND, context, group.sizes)
        return self.parts[group.parts[0]].controller.act(group.layer, x_ND, context)

    def keep(self, alive_B: Tensor) -> None:
        """Only the living rows stay. Members that have none left leave their teams."""
        for group in self.groups:
            if all(group.context is not own for own in self.contexts):
                group.context.keep(alive_B[group.rows].nonzero()[:, 0])
        at = 0
        for part, context in enumerate(self.contexts):
            context.alive_B = alive_B[self.rows[part]]
            context.keep(context.alive_B.nonzero()[:, 0])
            self.rows[part] = slice(at, at + len(context.items))
            at = self.rows[part].stop
        self.groups = [self._fewer(group) for group in self.groups if any(self._sizes(group.parts))]

    def branch(self, row_R: Tensor, option_R: Tensor) -> None:
        """Each row becomes one for each of its options, side by side. row_R: of the batch, rising;
        parts and groups that have none left leave."""
        for group in self.groups:
            if all(group.context is not own for own in self.contexts):
                group.context.branch(*_within(group.rows, row_R, option_R))
        for context, rows in zip(self.contexts, self.rows, strict=True):
            context.branch(*_within(rows, row_R, option_R))
        at = 0
        for part, context in enumerate(self.contexts):
            self.rows[part] = slice(at, at + len(context.items))
            at = self.rows[part].stop
        self.groups = [self._fewer(group) for group in self.groups if any(self._sizes(group.parts))]

    def _fewer(self, group: ControllerGroup) -> ControllerGroup:
        who = [index for index in group.parts if self.contexts[index].items]
        team = self.teams.of([self.parts[index].controller for index in who], group.layer)
        rows, sizes = self._rows(who), self._sizes(who)
        return ControllerGroup(group.layer, who, team, rows, sizes, group.context)


def _within(rows: slice | Tensor, row_R: Tensor, option_R: Tensor) -> tuple[Tensor, Tensor]:
    """Of the branches of a batch those of these of its rows, as positions among them."""
    if isinstance(rows, slice):
        own_R = (row_R >= rows.start) & (row_R < rows.stop)
        return row_R[own_R] - rows.start, option_R[own_R]
    # The rows of a team may lie apart; its parts keep their order.
    place_R = (rows[None, :] == row_R[:, None]).long()
    own_R = place_R.any(dim=1)
    at_R, order_R = place_R[own_R].argmax(dim=1).sort(stable=True)
    return at_R, option_R[own_R][order_R]
