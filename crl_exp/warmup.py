"""Stage 1: how every feature goes with success, measured once and shared by all runs.

The unsteered model answers the training prompts; at each steered position the SAE's activations
are pooled over the answer and correlated with its reward (CorrSteer, arXiv 2508.12535).
Shapes: B rows, D d_model, F d_sae.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from crl_exp.controllers.base import Controller
from crl_exp.controllers.observer import Observer
from crl_exp.correlation import Moments, StreamingCorrelation
from crl_exp.errors import UserError, did_you_mean
from crl_exp.saes import LayerSAE
from crl_exp.scores import NEGATIVE, SCORES, handle_negative, scaled

POOLINGS = ("max", "mean", "last_prompt")
KEPT_NORMS = 20_000
STATISTICS_FORMAT = 2
"""Of the stored files: those of another format lie under other keys."""


@dataclass
class WarmupConfig:
    """How the statistics are made.

    pooling: of a feature's activations over an answer's tokens: max, mean, or last_prompt (the
        last prompt token alone).
    min_frequency: only features active in at least this share of the answers may be steered.
    keep: best features listed in features.json, for each layer.
    score: what features are ranked by: pearson, or as baselines mutual_information, fisher,
        mean_difference or composite; these are scaled to the range of r.
    negative: features with a negative score: keep them as they are, clip their score at 0, or
        steer: rank them by their score's size and add them with a negative coefficient.
    """

    pooling: str
    min_frequency: float
    keep: int
    score: str
    negative: str

    def faults(self) -> list[str]:
        found = []
        choices = (("pooling", POOLINGS), ("score", SCORES), ("negative", NEGATIVE))
        for name, known in choices:
            value = getattr(self, name)
            if value not in known:
                near = did_you_mean(value, known)
                found.append(f"warmup.{name}={value}: must be one of {', '.join(known)}{near}")
        if not 0 <= self.min_frequency < 1:
            found.append(f"warmup.min_frequency={self.min_frequency}: must be in [0, 1)")
        if self.keep < 1:
            found.append(f"warmup.keep={self.keep}: must be at least 1")
        return found


@dataclass
class LayerStatistics:
    """What stage 1 knows of one layer. Feature tensors are float64 [F].

    mean_D, std_D: of the observed residual. median_norm, norm_mean, norm_std: of its length.
    moments: of every feature and the reward, from which the correlations can be carried on.
    by_feature["score"]: what features are ranked by; set by `scored`.
    """

    layer: int
    n: int
    accuracy: float
    median_norm: float
    norm_mean: float
    norm_std: float
    mean_D: Tensor
    std_D: Tensor
    moments: Moments
    by_feature: dict[str, Tensor]

    @property
    def correlation(self) -> Tensor:
        return self.by_feature["correlation"]

    @property
    def score(self) -> Tensor:
        return self.by_feature["score"]

    def scored(self, config: WarmupConfig) -> LayerStatistics:
        """With `score` [F] as `warmup.score` and `warmup.negative` say, and its `sign`."""
        name = "correlation" if config.score == "pearson" else config.score
        raw_F = scaled(config.score, self.by_feature[name])
        more = {"score": handle_negative(raw_F, config.negative), "sign": raw_F.sign()}
        return replace(self, by_feature={**self.by_feature, **more})

    def allowed(self, min_frequency: float) -> Tensor:
        """Features [C] active often enough to be steered, in order of their index."""
        return (self.by_feature["frequency"] >= min_frequency).nonzero()[:, 0]

    def best(self, min_frequency: float, k: int = 1) -> list[int]:
        """The k allowed features with the highest score, best first."""
        allowed_C = self.allowed(min_frequency)
        order = self.score[allowed_C].argsort(descending=True, stable=True)
        return allowed_C[order[:k]].tolist()

    def save(self, path: Path) -> None:
        """Write atomically: a reader sees the whole file or none."""
        meta: dict[str, Any] = {name: getattr(self, name) for name in _SCALARS}
        meta["moments"] = {name: getattr(self.moments, name) for name in _MOMENT_SCALARS}
        tensors = {f"feature.{k}": v.contiguous() for k, v in self.by_feature.items()}
        tensors |= {f"moments.{name}": getattr(self.moments, name) for name in _MOMENT_TENSORS}
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
            parts: dict[str, Any] = {k: tensors.pop(f"moments.{k}") for k in _MOMENT_TENSORS}
            moments = Moments(**meta.pop("moments"), **parts)
            features = {k.removeprefix("feature."): v for k, v in tensors.items()}
            return cls(**meta, mean_D=mean_D, std_D=std_D, moments=moments, by_feature=features)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"stored warmup statistics {path} can't be read ({error}); delete the file"
            ) from error


_SCALARS = ("layer", "n", "accuracy", "median_norm", "norm_mean", "norm_std")
_MOMENT_SCALARS = ("n", "origin_y", "mean_y", "m2_y")
_MOMENT_TENSORS = ("origin_F", "mean_F", "m2_F", "cov_F")


Answer = Callable[[Controller, Sequence[int]], Tensor]
"""Lets a controller see the generation for these items; returns their rewards [B]."""


def measure(
    saes: dict[int, LayerSAE],
    pooling: str,
    n_items: int,
    batch_size: int,
    answer: Answer,
    keep_values: bool = False,
) -> dict[int, LayerStatistics]:
    """One pass over the training prompts, all layers at once.

    keep_values: as in `StreamingCorrelation`.
    """
    streams = {layer: StreamingCorrelation(keep_values) for layer in saes}
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
    assert stream.moments is not None
    norm_N, found = torch.cat(norms).double(), stream.statistics()
    plain: dict[str, Any] = {
        name: value.cpu() for name, value in vars(stream.moments).items() if name in _MOMENT_TENSORS
    }
    return LayerStatistics(
        layer=layer,
        n=stream.n,
        accuracy=accuracy,
        median_norm=float(norm_N.median()),
        norm_mean=float(norm_N.mean()),
        norm_std=float(norm_N.std(correction=0)),
        moments=replace(stream.moments, **plain),
        mean_D=(seen.origin_F + seen.mean_F).cpu(),
        std_D=(seen.m2_F / max(seen.n - 1, 1)).sqrt().cpu(),
        by_feature={name: t.cpu() for name, t in found.items()},
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
