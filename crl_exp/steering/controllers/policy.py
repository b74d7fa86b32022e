"""The controller that steers by learned policies, and those of one shape and setting in one go:
one matrix product over stacked weights.

Each row goes through its own policy. Everything else (activations, memory, draws, decoder rows) is
computed for all rows together, as for one policy.
Shapes: G members, R rows of the member that has most, N rows of all, D d_model, C allowed features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state

from crl_exp.analysis.row_random import layer_keys, option_keys
from crl_exp.generation.controller import Action, Controller, StepContext, Team, slots
from crl_exp.generation.grouping import PaddedRows
from crl_exp.generation.row_memory import Memory
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.policy.agent import LayerAgent
from crl_exp.steering.policy.prompt_past import PromptPast
from crl_exp.steering.stages.base import Observation

LOGITS_TOGETHER = {"cuda": 2**26, "cpu": 2**17}
"""Numbers of one tensor [G, R, C]. A GPU wants few large kernels: 256 MiB in float32, of which
there are some ten. On a CPU, what a core's cache doesn't hold costs more than more calls do."""


class PolicyController(Controller):
    """Steers every layer by its own agent: sampled while training, the top features otherwise.

    generator: of the training's exploration; one number is taken, the seed of this rollout. None:
        the top features, or where a stage samples always (`Stage.samples`) a draw by the run's
        seed and the item.
    """

    def __init__(
        self,
        agents: dict[int, LayerAgent],
        decay: Decay,
        generator: torch.Generator | None = None,
        progress: float = 0.0,
    ):
        super().__init__({layer: agent.sae[0].site for layer, agent in agents.items()})
        self.agents, self.decay = agents, decay
        self.progress = progress
        self.prompt_past = PromptPast()
        self.explores = generator is not None
        sampling = [agent for agent in agents.values() if agent.pipeline.samples]
        self.seed: int | None = sampling[0].seed if sampling else None
        if generator is not None:
            drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
            self.seed = int(drawn)

    def begin(self, context: StepContext) -> None:
        for agent in self.agents.values():
            if "importance" in agent.pipeline.needs:
                agent.prompt_means(context)
            if "prompt_past" in agent.pipeline.needs:
                assert context.prompt is not None
                self.prompt_past.read(agent, context.prompt)

    def batch_key(self, layer: int) -> Hashable:
        explored = self.progress if self.explores else None
        return PolicyController, self.setting(layer), explored

    def setting(self, layer: int) -> Hashable:
        """What a graph of its step depends on."""
        return self.agents[layer].setting(), repr(self.decay), self.seed is None, self.explores

    @staticmethod
    def team(members: Sequence[Controller], layer: int) -> PolicyTeam:
        return PolicyTeam([m for m in members if isinstance(m, PolicyController)], layer)

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action:
        return self.team([self], layer).act(x_BD, context, [len(x_BD)])


class PolicyTeam(Team):
    """Members of one `PolicyController.batch_key` at one layer. Their weights are stacked once."""

    def __init__(self, members: Sequence[PolicyController], layer: int):
        self.layer, self.members = layer, list(members)
        self.agents = [member.agents[layer] for member in members]
        self.first = self.agents[0]
        self.seeds = [member.seed for member in members]
        self.explores = members[0].explores
        self.setting = members[0].setting(layer), len(members)
        self.decay = members[0].decay
        self.progress: float | Tensor = members[0].progress
        self.own = False  # whether the weights are a graph's own, not the agents'

    @cached_property
    def stacked(self) -> Any:
        """Parameters and buffers by name, each [G, …]."""
        return stack_module_state(self.agents)

    def tensors(self) -> list[Tensor]:
        state = [tensor for one in self.stacked for tensor in one.values()]
        progress = torch.as_tensor(self.progress, dtype=torch.float64)
        return [*state, progress.to(state[0].device)]

    def captured(self) -> PolicyTeam:
        made = copy.copy(self)
        made.stacked = stack_module_state(self.agents)
        made.progress, made.own = self.tensors()[-1].clone(), True
        return made

    @torch.no_grad()
    def act(self, x_ND: Tensor, context: StepContext, sizes: Sequence[int]) -> Action:
        first, memory = self.first, Memory.of(self.layer, context)
        held = first.remember(x_ND, memory, context, lambda: self._prompt_past(context, sizes))
        token_index: int | Tensor = context.token_index
        if not isinstance(token_index, Tensor):
            token_index = torch.full((), token_index, device=x_ND.device)
        rows = {"x_BD": x_ND, **held}
        if self.seeds[0] is not None:
            if memory.key_B is None:
                place_N = context.row_B if self.explores else torch.tensor(context.items)
                memory.key_B = self._keys(place_N.to(x_ND.device), sizes)
            rows["key_B"] = memory.key_B
            if context.option_B is not None:
                rows["key_B"] = option_keys(memory.key_B, context.option_B)
        made = self._made(rows, sizes, token_index)
        memory.note(made.pop("length_B", None))
        return self._action(made, held, self.decay.at(context.token_index))

    def _prompt_past(self, context: StepContext, sizes: Sequence[int]) -> Tensor:
        assert context.prompt is not None
        ends = list(accumulate(sizes, initial=0))
        parts = [context.prompt.part(list(range(a, b))) for a, b in pairwise(ends)]
        found = zip(self.members, self.agents, parts, strict=True)
        return torch.cat([member.prompt_past.of(agent, part) for member, agent, part in found])

    def _keys(self, row_N: Tensor, sizes: Sequence[int]) -> Tensor:
        parts = zip(self.seeds, row_N.split(list(sizes)), strict=True)
        return torch.cat([layer_keys(seed or 0, row_R, self.layer) for seed, row_R in parts])

    def _made(
        self, rows: dict[str, Tensor], sizes: Sequence[int], token_index: Tensor
    ) -> dict[str, Tensor]:
        """`LayerAgent.forward` for every row, by its own member. rows: its arguments, [N, …]."""

        def decide(agent: Callable[..., dict[str, Tensor]], rows: dict[str, Tensor]):
            held = {name: rows[name] for name in rows.keys() - {"x_BD", "key_B"}}
            key_B = rows.get("key_B")
            return agent(rows["x_BD"], held, token_index, key_B, self.progress, self.explores)

        if len(self.agents) == 1 and not self.own:
            return decide(self.first, rows)
        x_ND = rows["x_BD"]
        together = LOGITS_TOGETHER["cuda" if x_ND.is_cuda else "cpu"]
        chunk = together // (max(sizes) * len(self.first.actions))
        if chunk <= 1 and not self.own:
            split = {name: tensor.split(list(sizes)) for name, tensor in rows.items()}
            each = [
                decide(agent, {name: parts[g] for name, parts in split.items()})
                for g, agent in enumerate(self.agents)
            ]
            return {name: torch.cat([made[name] for made in each]) for name in each[0]}

        def stacked(state: Any, rows: dict[str, Tensor]) -> dict[str, Tensor]:
            return decide(lambda *given: functional_call(self.first, state, given), rows)

        places = PaddedRows.of(sizes, x_ND.device)
        padded = {name: places.padded(tensor) for name, tensor in rows.items()}
        made = torch.vmap(stacked, chunk_size=max(chunk, 1))(self.stacked, padded)
        return {name: places.flat(tensor) for name, tensor in made.items()}

    def _action(
        self, made: dict[str, Tensor], held: dict[str, Tensor], decay: float | Tensor
    ) -> Action:
        coefficient_NK = made["coefficient_BK"] * decay
        if self.explores and self.first.dose_growth:
            grown = torch.as_tensor(self.progress, device=coefficient_NK.device)
            coefficient_NK = coefficient_NK * (grown / self.first.dose_growth).clamp(max=1)
        notes: dict[str, Tensor] = {}
        if self.explores:  # what the update computes the distribution from again
            observed = {**made, **held}
            names = [f.name for f in fields(Observation) if f.name in observed]
            notes = {name: observed[name] for name in [*names, "choice_BK"]}
        feature_idx_NK = made["feature_idx_BK"]
        delta_ND = slots(feature_idx_NK, coefficient_NK, self.first.sae[0].W_dec_FD)
        if self.first.actions.null:  # of all numbers x + (−0.0) alone is x to the last bit
            delta_ND = delta_ND.where((feature_idx_NK >= 0).any(dim=1, keepdim=True), -0.0)
        return Action(
            delta_BD=delta_ND,
            feature_idx_BK=feature_idx_NK,
            coefficient_BK=coefficient_NK,
            log_prob_B=made["log_prob_B"],
            value_B=made.get("value_B"),
            notes=notes,
        )
