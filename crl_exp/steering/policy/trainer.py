"""Stage 2: learning which feature to add at which token. Reads from top to bottom.

Roll out a batch of prompts with the current policies, score the answers, and let every layer's
policy and critic learn from the shared reward. The update never runs the language model.
Shapes: B episodes (answers).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor

from crl_exp.generation.engine import Generation
from crl_exp.runs.checkpoints import CheckpointConfig
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.preemption import CheckpointTimer, Preempted
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.policy.agent import LayerAgent
from crl_exp.steering.policy.algorithms import Algorithm
from crl_exp.steering.policy.learner import LayerLearner, collect
from crl_exp.steering.policy.rollout_metrics import watch_choices

Play = Callable[[PolicyController, list[int]], tuple[Generation, Tensor]]
"""Answers these training prompts under the controller: the recorded generation and rewards [B]."""
Validate = Callable[[PolicyController, list[float]], float]
"""Mean reward of the greedy policy on the validation split. The list has the rewards of the items
answered so far, and grows: a validation that was cut off goes on from there."""


class Trainer:
    """The loop, with its place in it: everything that a checkpoint has to bring back."""

    def __init__(
        self,
        agents: dict[int, LayerAgent],
        algorithm: Algorithm,
        decay: Decay,
        seed: int,
        n_train: int,
        run: RunDirectory,
        checkpoint: CheckpointConfig,
    ):
        self.agents, self.algorithm, self.decay, self.run = agents, algorithm, decay, run
        self.checkpoint, self.n_train = checkpoint, n_train
        self.learners = {layer: LayerLearner(agent, algorithm) for layer, agent in agents.items()}
        device = next(iter(agents.values())).allowed_C.device
        self.explore = torch.Generator(device).manual_seed(seed)
        self.shuffle = torch.Generator().manual_seed(seed + 1)
        self.queue: list[int] = []
        self.step = 0
        self.unvalidated = False
        self.validated: list[float] = []  # rewards of a validation that isn't at its end
        self.tried: list[Tensor] = []  # rewards [I] of each validation that is
        self.best_score = float("-inf")
        self.best_step = 0
        self.best_agents = self._averaged_states()

    def train(self, play: Play, validate: Validate, on_step: Callable[[int], None]) -> None:
        """Run to the last update, from a checkpoint if there is one; ends with the best policy."""
        state = self.run.load_checkpoint()
        if state is not None:
            self._restore(state)
            done = self.step - self.unvalidated
            on_step(done)
            self.run.progress.known(done)
        pace = CheckpointTimer(self.checkpoint)
        while self.step < self.algorithm.n_updates or self.unvalidated:
            try:
                if not self.unvalidated:
                    self._update(play)
                self._validate(validate)
            except Preempted:  # in a validation, or where prompts are read for the first time
                self._save()
                raise
            self.unvalidated, self.validated = False, []
            on_step(1)
            pace.after_step(self._save)
        if pace.unsaved:
            self._save()
        last = self.best_agents if self.algorithm.validate_every else self._averaged_states()
        for layer, agent in self.agents.items():
            agent.load_state_dict(last[layer])

    def _save(self) -> None:
        self.run.save_checkpoint(self._state())

    def _update(self, play: Play) -> None:
        """One step. Where it is asked to end before the rollout is there, nothing is changed."""
        started, step = time.perf_counter(), self.step + 1
        progress, before = self.step / self.algorithm.n_updates, self.explore.get_state()
        controller = PolicyController(self.agents, self.decay, self.explore, progress)
        prompts = self._next_prompts()
        try:
            played, reward_B = play(controller, self.algorithm.answered(prompts))
        except Preempted:
            self.explore.set_state(before)
            raise
        self.queue = self.queue[len(prompts) :]
        rolled_out = time.perf_counter()
        metrics = {"reward": float(reward_B.mean())}
        for layer, learner in self.learners.items():
            rollout = collect(layer, played, reward_B, self.algorithm)
            watched = learner.update(rollout, step, self.shuffle)
            if learner.agent.online is not None:
                learner.follow(played, reward_B)
            watched |= watch_choices(learner.agent, played)
            metrics |= {f"layer_{layer}/{name}": value for name, value in watched.items()}
        metrics["seconds_rollout"] = rolled_out - started
        metrics["seconds_update"] = time.perf_counter() - rolled_out
        self.run.log(step, metrics)
        self.step, self.unvalidated = step, True

    def _next_prompts(self) -> list[int]:
        while len(self.queue) < self.algorithm.prompts_per_update:
            self.queue += torch.randperm(self.n_train, generator=self.shuffle).tolist()
        return self.queue[: self.algorithm.prompts_per_update]

    def _validate(self, validate: Validate) -> None:
        every = self.algorithm.validate_every
        if not every or (self.step % every and self.step != self.algorithm.n_updates):
            return
        averaged = {layer: learner.averaged for layer, learner in self.learners.items()}
        score = validate(PolicyController(averaged, self.decay), self.validated)
        self.tried.append(torch.tensor(self.validated))
        self.run.log(self.step, {"validation_reward": score})
        if score > self.best_score:
            self.best_score, self.best_step = score, self.step
            self.best_agents = self._averaged_states()

    def _averaged_states(self) -> dict[int, dict]:
        return {
            layer: copy.deepcopy(learner.averaged.state_dict())
            for layer, learner in self.learners.items()
        }

    def _state(self) -> dict:
        return {
            "step": self.step,
            "unvalidated": self.unvalidated,
            "validated": self.validated,
            "tried": self.tried,
            "learners": {layer: learner.state() for layer, learner in self.learners.items()},
            "best": {
                "score": self.best_score, "step": self.best_step, "agents": self.best_agents,
            },
            # For who has the policy without stage 1 (`CRL.restored`).
            "norms": {la: [agent.norm_mean, agent.norm_std] for la, agent in self.agents.items()},
            "queue": self.queue,
            "explore": self.explore.get_state(),
            "shuffle": self.shuffle.get_state(),
        }  # fmt: skip

    def _restore(self, state: dict) -> None:
        self.step, self.queue = state["step"], state["queue"]
        self.unvalidated, self.validated = state["unvalidated"], state["validated"]
        self.tried = state.get("tried", [])  # earlier versions kept none
        for layer, learner in self.learners.items():
            learner.load(state["learners"][layer])
        best = state["best"]
        self.best_score, self.best_step = best["score"], best["step"]
        self.best_agents = best["agents"]
        self.explore.set_state(state["explore"])
        self.shuffle.set_state(state["shuffle"])
