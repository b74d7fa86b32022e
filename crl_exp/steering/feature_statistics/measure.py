"""Stage 1's one pass over the training prompts, which goes on where it was cut off.

The unsteered model answers the training prompts; at each steered position the SAE's activations
are pooled over the answer and correlated with its reward (CorrSteer, arXiv 2508.12535).
Shapes: B rows, D d_model, F d_sae, N observed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crl_exp.analysis.histograms import LogHistogram
from crl_exp.analysis.moments import GroupSums
from crl_exp.generation.controller import Controller
from crl_exp.runs.checkpoints import CheckpointConfig
from crl_exp.runs.preemption import CheckpointTimer
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.controllers.observer import Observer, Residuals
from crl_exp.steering.feature_statistics.contrast import contrasted, harm
from crl_exp.steering.feature_statistics.correlation import Moments, StreamingCorrelation
from crl_exp.steering.feature_statistics.scores import KEPT, KeptValues
from crl_exp.steering.feature_statistics.store import MOMENT_TENSORS, LayerStatistics, PartialPass
from crl_exp.steering.workspace import Workspace

KEPT_NORMS = 20_000

Answer = Callable[[Controller, Sequence[int]], Tensor]
"""Lets a controller see the generation for these items; returns their rewards [B]."""


class LayerPass:
    """What is streamed of one layer."""

    def __init__(self, device: torch.device, keep: str | None, rewarded: str):
        self.device = device
        self.stream = StreamingCorrelation(keep, rewarded)
        self.observed: Moments | None = None
        self.norms: list[Tensor] = []

    def take(self, pooled_BF: Tensor, residuals: Residuals, reward_B: Tensor) -> None:
        """Take in a batch of answers: pooled activations, observed residuals, rewards."""
        self.stream.update(pooled_BF, reward_B.to(self.device))
        part = residuals.moments
        self.observed = part if self.observed is None else self.observed.merged(part)
        if sum(map(len, self.norms)) < KEPT_NORMS:
            self.norms.append(residuals.norm_N)

    def state(self) -> dict[str, Any]:
        stream = self.stream
        assert stream.moments and stream.rewarded and stream.unrewarded and self.observed
        counts = [histogram.count_FN for histogram in stream.histograms or ()]
        return {
            "moments": vars(stream.moments), "rewarded": vars(stream.rewarded),
            "unrewarded": vars(stream.unrewarded), "observed": vars(self.observed),
            "kept": None if stream.kept is None else vars(stream.kept), "norms": self.norms,
            "histograms": counts or None,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        def there(values: dict[str, Any]) -> dict[str, Any]:
            return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in values.items()}

        self.stream.moments = Moments(**there(state["moments"]))
        self.stream.rewarded = GroupSums(**there(state["rewarded"]))
        self.stream.unrewarded = GroupSums(**there(state["unrewarded"]))
        self.observed = Moments(**there(state["observed"]))
        if state["kept"] is not None:
            kept = {k: [t.to(self.device) for t in parts] for k, parts in state["kept"].items()}
            self.stream.kept = KeptValues(**kept)
        if state["histograms"] is not None:
            good, bad = (LogHistogram(t.to(self.device)) for t in state["histograms"])
            self.stream.histograms = good, bad
        self.norms = [norm_N.to(self.device) for norm_N in state["norms"]]

    def statistics(self, layer: int, accuracy: float) -> LayerStatistics:
        moments, seen = self.stream.moments, self.observed
        assert moments is not None and seen is not None
        norm_N, found = torch.cat(self.norms).double(), self.stream.statistics()
        plain: dict[str, Any] = {
            name: value.cpu() for name, value in vars(moments).items() if name in MOMENT_TENSORS
        }
        return LayerStatistics(
            layer=layer,
            n=self.stream.n,
            accuracy=accuracy,
            median_norm=float(norm_N.median()),
            norm_mean=float(norm_N.mean()),
            norm_std=float(norm_N.std(correction=0)),
            moments=replace(moments, **plain),
            mean_D=(seen.origin_F + seen.mean_F).cpu(),
            std_D=(seen.m2_F / max(seen.n - 1, 1)).sqrt().cpu(),
            by_feature={name: t.cpu() for name, t in found.items()},
        )


def measure(
    saes: dict[int, LayerSAE],
    pooling: str,
    n_items: int,
    batch_size: int,
    answer: Answer,
    keep: str | None = None,
    rewarded: str = "positive",
    saved: tuple[PartialPass, CheckpointConfig] | None = None,
    skip: Callable[[int], None] = lambda n: None,
) -> dict[int, LayerStatistics]:
    """One pass over the training prompts, all layers at once.

    keep, rewarded: as in `StreamingCorrelation`. saved: where and how often to save the pass, and
    to go on from. skip: told how many items an earlier attempt did.
    """
    passes = {la: LayerPass(sae.W_dec_FD.device, keep, rewarded) for la, sae in saes.items()}
    at, right = 0, 0.0
    state = saved[0].load() if saved else None
    if state is not None:
        at, right = state["at"], state["right"]
        for layer, one in passes.items():
            one.load(state["layers"][layer])
        skip(at)
    pace = CheckpointTimer(saved[1]) if saved else None
    while at < n_items:
        observer = Observer(saes, pooling)
        items = range(at, min(at + batch_size, n_items))
        reward_B = answer(observer, items)
        right += float(reward_B.sum())
        for layer, one in passes.items():
            one.take(observer.pooled_BF[layer], observer.residuals[layer], reward_B)
        at += len(items)
        if saved and pace:
            layers = {layer: one.state() for layer, one in passes.items()}
            now = {"at": at, "right": right, "layers": layers}
            pace.after_step(lambda now=now: saved[0].save(now))
    return {layer: one.statistics(layer, right / n_items) for layer, one in passes.items()}


def measure_of(
    workspace: Workspace, saes: dict[int, LayerSAE], partial: PartialPass
) -> dict[int, LayerStatistics]:
    """Its training split, with its progress shown. In place of the reward `warmup.contrast`
    may put whether a prompt is harmful, or was refused."""
    exp, train = workspace.exp, workspace.splits.train
    n, harm_I = len(train), harm(exp.warmup.contrast, exp.task, train)
    workspace.prompts("train")
    with workspace.bar(f"warmup, layers {sorted(saes)}", n) as advance:

        def answer(controller: Controller, items: Sequence[int]) -> Tensor:
            reward_B = workspace.answer(controller, "train", items).reward_B
            advance(len(items))
            harm_B = None if harm_I is None else harm_I[list(items)]
            return contrasted(exp.warmup.contrast, reward_B, harm_B)

        def skip(n_done: int) -> None:
            advance(n_done)
            workspace.run.progress.known(n_done)

        found = measure(
            saes, exp.warmup.pooling, n, exp.engine.items_together, answer,
            KEPT.get(exp.warmup.score), exp.warmup.rewarded, (partial, exp.checkpoint), skip,
        )  # fmt: skip
    return found


def warn_of_one_outcome(workspace: Workspace, found: LayerStatistics) -> None:
    """Whoever measured them: statistics in which nothing can be told apart are in the result."""
    if found.accuracy in (0.0, 1.0):
        workspace.warn(
            f"the unsteered model gets {'all' if found.accuracy else 'none'} of the {found.n} "
            "training items right: every correlation is 0 and features can't be told apart. "
            "Use a task of medium difficulty or more items (task.n_train=…)"
        )
