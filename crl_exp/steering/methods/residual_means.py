"""Mean residual of rewarded and of unrewarded answers, streamed over the training prompts; with
`warmup.contrast=benign` of harmful and of benign prompts.

Shapes: B rows, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crl_exp.analysis.moments import is_rewarded
from crl_exp.generation.controller import Action, Controller, StepContext
from crl_exp.runs.preemption import CheckpointTimer
from crl_exp.steering.controllers.observer import Seen
from crl_exp.steering.feature_statistics.contrast import contrasted, harm
from crl_exp.steering.workspace import Workspace


@dataclass
class ResidualMeans:
    """GroupSums of one layer's residuals, float64 [D]."""

    rewarded_D: Tensor
    unrewarded_D: Tensor
    n_rewarded: int = 0
    n_unrewarded: int = 0

    @classmethod
    def none(cls, d_model: int) -> ResidualMeans:
        zeros_D = torch.zeros(d_model, dtype=torch.float64)
        return cls(zeros_D, zeros_D.clone())

    def update(self, x_BD: Tensor, reward_B: Tensor, rewarded: str = "positive") -> None:
        """Take in a batch of answers: one residual and one reward each. rewarded: of `warmup`."""
        x_BD, good_B = x_BD.double().cpu(), is_rewarded(reward_B.cpu(), rewarded)
        self.rewarded_D += x_BD[good_B].sum(0)
        self.unrewarded_D += x_BD[~good_B].sum(0)
        self.n_rewarded += int(good_B.sum())
        self.n_unrewarded += int((~good_B).sum())

    @property
    def contrast_D(self) -> Tensor:
        """Mean over rewarded minus mean over unrewarded answers, float32."""
        rewarded_D = self.rewarded_D / self.n_rewarded
        return (rewarded_D - self.unrewarded_D / self.n_unrewarded).float()


class ResidualObserver(Controller):
    """Averages each row's residual over its steered tokens, and adds nothing.

    last_prompt: the last prompt token's alone.
    """

    steers = False

    def __init__(self, sites: dict[int, int], last_prompt: bool):
        super().__init__(sites)
        self.last_prompt = last_prompt
        self.total_BD: dict[int, Tensor] = {}
        self.count_B: dict[int, Tensor] = {}

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action | None:
        Seen.of(layer, context).see(x_BD, context)
        return None

    def end(self, context: StepContext) -> None:
        for layer in self.sites:
            for index, (x_RD, rows_R) in enumerate(Seen.of(layer, context).taken(context)):
                self._add(layer, index, x_RD.double(), rows_R.to(x_RD.device), context.n_rows)

    def _add(self, layer: int, index: int, x_RD: Tensor, rows_R: Tensor, n_rows: int) -> None:
        if layer not in self.total_BD:
            self.total_BD[layer] = x_RD.new_zeros(n_rows, x_RD.shape[1])
            self.count_B[layer] = x_RD.new_zeros(n_rows)
        if index == 0:
            self.total_BD[layer][rows_R], self.count_B[layer][rows_R] = x_RD, 1.0
        elif not self.last_prompt:
            self.total_BD[layer][rows_R] += x_RD
            self.count_B[layer][rows_R] += 1

    def mean(self, layer: int) -> Tensor:
        """Mean residual [B, D] of each row."""
        return self.total_BD[layer] / self.count_B[layer][:, None]


def residual_means(workspace: Workspace) -> dict[int, ResidualMeans]:
    """One unsteered pass over the training prompts, all of the workspace's layers at once."""
    sites = dict(workspace.sites)
    found = {layer: ResidualMeans.none(workspace.lm.d_model) for layer in sites}
    harm_I = harm(workspace.exp.warmup.contrast, workspace.exp.task, workspace.splits.train)
    n, batch_size = len(workspace.splits.train), workspace.exp.engine.items_together
    checkpoint, pace, at = (
        workspace.run.checkpoint("residuals"),
        CheckpointTimer(workspace.exp.checkpoint),
        0,
    )
    state = checkpoint.load()
    if state is not None:
        at = state["at"]
        found = {layer: ResidualMeans(**means) for layer, means in state["layers"].items()}

    def save() -> None:
        checkpoint.save({"at": at, "layers": {la: vars(means) for la, means in found.items()}})

    with workspace.bar(f"residuals of layers {sorted(sites)}", n, at) as advance:
        while at < n:
            items = range(at, min(at + batch_size, n))
            observer = ResidualObserver(sites, workspace.exp.warmup.pooling == "last_prompt")
            reward_B = workspace.answer(observer, "train", items).reward_B
            harm_B = None if harm_I is None else harm_I[list(items)]
            label_B = contrasted(workspace.exp.warmup.contrast, reward_B, harm_B)
            for layer, means in found.items():
                means.update(observer.mean(layer), label_B, workspace.exp.warmup.rewarded)
            at += len(items)
            advance(len(items))
            pace.after_step(save)
    if pace.unsaved:
        save()
    return found
