"""Stage 1: how every feature goes with success, measured once and shared by all runs.

The unsteered model answers the training prompts; at each steered position the SAE's activations
are pooled over the answer and correlated with its reward (CorrSteer, arXiv 2508.12535).
Shapes: B rows, D d_model, F d_sae.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from crl_exp.controllers.base import Action, Controller, StepContext
from crl_exp.correlation import Moments, StreamingCorrelation
from crl_exp.errors import UserError, did_you_mean
from crl_exp.saes import LayerSAE

POOLINGS = ("max", "mean", "last_prompt")
KEPT_NORMS = 20_000


@dataclass
class WarmupConfig:
    """How the statistics are made.

    pooling: of a feature's activations over an answer's tokens: max, mean, or last_prompt (the
        last prompt token alone).
    min_frequency: only features active in at least this share of the answers may be steered.
    keep: best features listed in features.json, for each layer.
    """

    pooling: str
    min_frequency: float
    keep: int

    def faults(self) -> list[str]:
        found = []
        if self.pooling not in POOLINGS:
            near = did_you_mean(self.pooling, POOLINGS)
            found.append(
                f"warmup.pooling={self.pooling}: must be one of {', '.join(POOLINGS)}{near}"
            )
        if not 0 <= self.min_frequency < 1:
            found.append(f"warmup.min_frequency={self.min_frequency}: must be in [0, 1)")
        if self.keep < 1:
            found.append(f"warmup.keep={self.keep}: must be at least 1")
        return found


@dataclass
class LayerStatistics:
    """What stage 1 knows of one layer. Feature tensors are float64 [F].

    mean_D, std_D: of the observed residual. median_norm: of its length.
    """

    layer: int
    n: int
    accuracy: float
    median_norm: float
    mean_D: Tensor
    std_D: Tensor
    by_feature: dict[str, Tensor]

    @property
    def correlation(self) -> Tensor:
        return self.by_feature["correlation"]

    def allowed(self, min_frequency: float) -> Tensor:
        """Features [C] active often enough to be steered, in order of their index."""
        return (self.by_feature["frequency"] >= min_frequency).nonzero()[:, 0]

    def best(self, min_frequency: float, k: int = 1) -> list[int]:
        """The k allowed features with the highest correlation, best first."""
        allowed_C = self.allowed(min_frequency)
        order = self.correlation[allowed_C].argsort(descending=True, stable=True)
        return allowed_C[order[:k]].tolist()

    def save(self, path: Path) -> None:
        """Write atomically: a reader sees the whole file or none."""
        meta = {"layer": self.layer, "n": self.n, "accuracy": self.accuracy}
        meta["median_norm"] = self.median_norm
        tensors = {f"feature.{k}": v.contiguous() for k, v in self.by_feature.items()}
        tensors |= {"mean_D": self.mean_D, "std_D": self.std_D}
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, partial, metadata={"statistics": json.dumps(meta)})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> LayerStatistics:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads(file.metadata()["statistics"])
            tensors = load_file(path)
            mean_D, std_D = tensors.pop("mean_D"), tensors.pop("std_D")
            features = {k.removeprefix("feature."): v for k, v in tensors.items()}
            return cls(**meta, mean_D=mean_D, std_D=std_D, by_feature=features)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"stored warmup statistics {path} can't be read ({error}); delete the file"
            ) from error


class Observer(Controller):
    """Looks at every steered position, pools the activations of each row, and adds nothing."""

    steers = False

    def __init__(self, saes: dict[int, LayerSAE], pooling: str):
        super().__init__({layer: sae.site for layer, sae in saes.items()})
        self.saes, self.pooling = saes, pooling
        self.pooled_BF: dict[int, Tensor] = {}
        self.count_B: dict[int, Tensor] = {}
        self.seen_ND: dict[int, list[Tensor]] = {layer: [] for layer in saes}

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action | None:
        self.seen_ND[layer].append(x_BD[context.alive_B].float())
        if self.pooling == "last_prompt" and context.token_index > 0:
            return None
        feature_acts_BF = self.saes[layer].encode(x_BD)
        alive_B = context.alive_B[:, None]
        if context.token_index == 0:
            self.pooled_BF[layer] = feature_acts_BF.clone()
            self.count_B[layer] = alive_B.double()
            return None
        before_BF = self.pooled_BF[layer]
        if self.pooling == "max":
            after_BF = torch.maximum(before_BF, feature_acts_BF)
        else:
            count_B = self.count_B[layer] + alive_B
            after_BF = before_BF + (feature_acts_BF - before_BF) / count_B.to(before_BF.dtype)
            self.count_B[layer] = count_B
        self.pooled_BF[layer] = torch.where(alive_B, after_BF, before_BF)
        return None


Answer = Callable[[Controller, Sequence[int]], Tensor]
"""Lets a controller see the generation for these items; returns their rewards [B]."""


def measure(
    saes: dict[int, LayerSAE], pooling: str, n_items: int, batch_size: int, answer: Answer
) -> dict[int, LayerStatistics]:
    """One pass over the training prompts, all layers at once."""
    streams = {layer: StreamingCorrelation() for layer in saes}
    observed: dict[int, Moments] = {}
    norms: dict[int, list[Tensor]] = {layer: [] for layer in saes}
    right = 0.0
    for at in range(0, n_items, batch_size):
        observer = Observer(saes, pooling)
        reward_B = answer(observer, range(at, min(at + batch_size, n_items)))
        right += float(reward_B.sum())
        for layer, stream in streams.items():
            stream.update(observer.pooled_BF[layer], reward_B.to(saes[layer].W_dec_FD.device))
            x_ND = torch.cat(observer.seen_ND[layer])
            part = Moments.of(x_ND, torch.zeros(len(x_ND), device=x_ND.device))
            observed[layer] = observed[layer].merged(part) if layer in observed else part
            if sum(map(len, norms[layer])) < KEPT_NORMS:
                norms[layer].append(x_ND.norm(dim=1))
    return {
        layer: _statistics(layer, streams[layer], observed[layer], norms[layer], right / n_items)
        for layer in saes
    }


def _statistics(
    layer: int, stream: StreamingCorrelation, seen: Moments, norms: list[Tensor], accuracy: float
) -> LayerStatistics:
    return LayerStatistics(
        layer=layer,
        n=stream.n,
        accuracy=accuracy,
        median_norm=float(torch.cat(norms).median()),
        mean_D=(seen.origin_F + seen.mean_F).cpu(),
        std_D=(seen.m2_F / max(seen.n - 1, 1)).sqrt().cpu(),
        by_feature={name: t.cpu() for name, t in stream.statistics().items()},
    )


def shared_statistics(
    folder: Path,
    key: str,
    saes: dict[int, LayerSAE],
    compute: Callable[[dict[int, LayerSAE]], dict[int, LayerStatistics]],
) -> dict[int, LayerStatistics]:
    """Load the layers that are stored under this content key; compute and store the others.

    Locked, so that runs starting together compute a layer once.
    """
    home = folder / key
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(str(home / ".lock")):
        missing = {la: sae for la, sae in saes.items() if not _file(home, sae).exists()}
        if missing:
            for layer, statistics in compute(missing).items():
                statistics.save(_file(home, saes[layer]))
    return {layer: LayerStatistics.load(_file(home, sae)) for layer, sae in saes.items()}


def _file(home: Path, sae: LayerSAE) -> Path:
    return home / f"layer_{sae.layer}_{sae.digest}.safetensors"
