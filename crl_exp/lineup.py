"""Who acts at which site for which rows of a batch.

Controllers of one kin act as one team, whatever jobs they belong to: no loop over rows or jobs.
Shapes: B rows of the batch, N rows of a troop, D d_model.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from crl_exp.controllers.base import Action, Controller, StepContext
from crl_exp.controllers.team import Team, Teams
from crl_exp.prompt_acts import PromptActs
from crl_exp.prompts import PromptBatch


@dataclass
class Part:
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
class Troop:
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
        """Of the troop's rows, each part's."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]


class Lineup:
    """The parts of a batch, each one's rows and notes, and the troops at each site.

    rows: of the rows still in the batch, each part's. contexts: each part's.
    """

    def __init__(self, prompt: PromptBatch, parts: list[Part], teams: Teams, device: torch.device):
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
        self.troops = [self._troop(layer, who) for layer, who in self._grouped()]

    def _grouped(self) -> list[tuple[int, list[int]]]:
        """Layer and parts of each troop."""
        found: dict[Hashable, tuple[int, list[int]]] = {}
        for index, part in enumerate(self.parts):
            for layer, site in part.controller.sites.items():
                kin = self.teams.kin(part.controller, layer)
                alike = index if kin is None else ("kin", kin)
                found.setdefault((layer, site, alike), (layer, []))[1].append(index)
        return list(found.values())

    def _troop(self, layer: int, who: list[int]) -> Troop:
        contexts = [self.contexts[index] for index in who]
        context = contexts[0] if len(who) == 1 else StepContext.joined(contexts)
        team = self.teams.of([self.parts[index].controller for index in who], layer)
        return Troop(layer, who, team, self._rows(who), self._sizes(who), context)

    def _rows(self, who: list[int]) -> slice | Tensor:
        rows = [self.rows[index] for index in who]
        if all(one.stop == next.start for one, next in pairwise(rows)):
            return slice(rows[0].start, rows[-1].stop)
        at = [torch.arange(one.start, one.stop) for one in rows]
        return torch.cat(at).to(self.device)

    def _sizes(self, who: list[int]) -> list[int]:
        return [len(self.contexts[index].items) for index in who]

    def steers(self, troop: Troop) -> bool:
        return bool(self.parts[troop.parts[0]].controller.steers)

    def at(self, steering: bool) -> dict[int, list[Troop]]:
        """By site, the troops that steer, or those that only look."""
        found: dict[int, list[Troop]] = {}
        for troop in self.troops:
            if self.steers(troop) == steering:
                site = self.parts[troop.parts[0]].controller.sites[troop.layer]
                found.setdefault(site, []).append(troop)
        return found

    def act(self, troop: Troop, x_ND: Tensor, token_index: int, alive_B: Tensor) -> Action | None:
        """What the troop does. alive_B: of the rows still in the batch."""
        context = troop.context
        context.token_index, context.alive_B = token_index, alive_B[troop.rows]
        if troop.team is not None:
            return troop.team.act(x_ND, context, troop.sizes)
        return self.parts[troop.parts[0]].controller.act(troop.layer, x_ND, context)

    def keep(self, alive_B: Tensor) -> None:
        """Only the living rows stay. Members that have none left leave their teams."""
        for troop in self.troops:
            if all(troop.context is not own for own in self.contexts):
                troop.context.keep(alive_B[troop.rows].nonzero()[:, 0])
        at = 0
        for part, context in enumerate(self.contexts):
            context.alive_B = alive_B[self.rows[part]]
            context.keep(context.alive_B.nonzero()[:, 0])
            self.rows[part] = slice(at, at + len(context.items))
            at = self.rows[part].stop
        self.troops = [self._fewer(troop) for troop in self.troops if any(self._sizes(troop.parts))]

    def branch(self, option_O: Tensor) -> None:
        """Each row becomes one for each of these options, side by side."""
        joint = [troop.context for troop in self.troops]
        for context in {id(one): one for one in [*self.contexts, *joint]}.values():
            context.branch(option_O)
        at = 0
        for part, context in enumerate(self.contexts):
            self.rows[part] = slice(at, at + len(context.items))
            at = self.rows[part].stop
        self.troops = [self._fewer(troop) for troop in self.troops]

    def _fewer(self, troop: Troop) -> Troop:
        who = [index for index in troop.parts if self.contexts[index].items]
        team = self.teams.of([self.parts[index].controller for index in who], troop.layer)
        rows, sizes = self._rows(who), self._sizes(who)
        return Troop(troop.layer, who, team, rows, sizes, troop.context)
