"""Policies of one shape and setting that act in one go: one matrix product over stacked weights.

Each row goes through its own policy. Everything else (activations, memory, draws, decoder rows) is
computed for all rows together, as for one policy.
Shapes: G members, R rows of the member that has most, N rows of all, D d_model, C allowed features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state

from crl_exp.controllers.base import Action, StepContext, slots
from crl_exp.controllers.team import Places, Team
from crl_exp.draws import layer_keys
from crl_exp.memory import Memory
from crl_exp.stages.base import Observation

if TYPE_CHECKING:
    from crl_exp.policy import PolicyController

LOGITS_TOGETHER = 2**26
"""Numbers of one tensor [G, R, C]: 256 MiB in float32, of which there are some ten."""


class PolicyTeam(Team):
    """Members of one `PolicyController.kin` at one layer. Their weights are stacked here, once."""

    def __init__(self, members: Sequence[PolicyController], layer: int):
        self.members, self.layer = members, layer
        self.agents = [member.agents[layer] for member in members]
        self.first = self.agents[0]
        # One alone is called as it is.
        self.stacked: Any = stack_module_state(self.agents) if len(members) > 1 else None

    @torch.no_grad()
    def act(self, x_ND: Tensor, context: StepContext, sizes: Sequence[int]) -> Action:
        first, memory = self.first, Memory.of(self.layer, context)
        held = first.remember(x_ND, memory, lambda: first.prompt_means(context))
        token_index = torch.full((), context.token_index, device=x_ND.device)
        places = Places.of(sizes, x_ND.device)
        key_N = self._keys(context.row_B.to(x_ND.device), sizes)
        made = self._made(x_ND, held, token_index, key_N, places)
        memory.note(made.pop("length_B", None))
        return self._action(made, held, self.members[0].decay.at(context.token_index))

    def _keys(self, row_N: Tensor, sizes: Sequence[int]) -> Tensor | None:
        if self.members[0].seed is None:
            return None
        parts = zip(self.members, row_N.split(list(sizes)), strict=True)
        return torch.cat([layer_keys(m.seed or 0, row_R, self.layer) for m, row_R in parts])

    def _made(
        self,
        x_ND: Tensor,
        held: dict[str, Tensor],
        token_index: Tensor,
        key_N: Tensor | None,
        places: Places,
    ) -> dict[str, Tensor]:
        """`LayerAgent.forward` for every row, by its own member."""
        progress = self.members[0].progress
        if self.stacked is None:
            return self.first(x_ND, held, token_index, key_N, progress)

        def one(state: Any, rows: dict[str, Tensor]) -> dict[str, Tensor]:
            x_RD, key_R = rows.pop("x_ND"), rows.pop("key_N", None)
            return functional_call(self.first, state, (x_RD, rows, token_index, key_R, progress))

        rows = {"x_ND": x_ND, **held} | ({} if key_N is None else {"key_N": key_N})
        padded = {name: places.padded(tensor) for name, tensor in rows.items()}
        chunk = max(1, LOGITS_TOGETHER // (places.most * len(self.first.allowed_C)))
        made = torch.vmap(one, chunk_size=chunk)(self.stacked, padded)
        return {name: places.flat(tensor) for name, tensor in made.items()}

    def _action(self, made: dict[str, Tensor], held: dict[str, Tensor], decay: float) -> Action:
        coefficient_NK = made["coefficient_BK"] * decay
        notes: dict[str, Tensor] = {}
        if self.members[0].seed is not None:  # what the update computes the distribution from again
            observed = {**made, **held}
            names = [f.name for f in fields(Observation) if f.name in observed]
            notes = {name: observed[name] for name in [*names, "choice_BK"]}
        return Action(
            delta_BD=slots(made["feature_idx_BK"], coefficient_NK, self.first.sae[0].W_dec_FD),
            feature_idx_BK=made["feature_idx_BK"],
            coefficient_BK=coefficient_NK,
            log_prob_B=made["log_prob_B"],
            value_B=made.get("value_B"),
            notes=notes,
        )
