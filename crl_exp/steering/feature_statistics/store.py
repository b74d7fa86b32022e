"""Stage 1: how every feature goes with success, stored and shared by all runs.

`measure` makes the statistics; `config` is the section. Shapes: D d_model, F d_sae.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from crl_exp.config.errors import UserError
from crl_exp.config.files import replacing, writing
from crl_exp.config.keys import content_key
from crl_exp.runs import preemption
from crl_exp.runs.checkpoints import Checkpoint, read_state
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.feature_statistics.config import WarmupConfig
from crl_exp.steering.feature_statistics.correlation import Moments
from crl_exp.steering.feature_statistics.scores import KEPT, handle_negative

STATISTICS_FORMAT = 3
"""Of the stored files: those of another format lie under other keys."""


@dataclass
class LayerStatistics:
    """What stage 1 knows of one layer. Feature tensors are float64 [F].

    mean_D, std_D: of the observed residual. median_norm, norm_mean, norm_std: of its length.
    n, accuracy: training items and the mean of what was correlated, the reward or, with
        warmup.contrast=benign, the share of harmful prompts.
    moments: of every feature and the reward, from which the correlations can be carried on.
    by_feature["score"], ["dropped"]: what features are ranked by, and which may not be steered
        whatever their frequency; set by `scored`.
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
        """With `score` [F] as `warmup.score` and `warmup.negative` say, its `sign`, and `dropped`.

        The score isn't scaled: layers are compared by it.
        """
        raw_F = self.by_feature["correlation" if config.score == "pearson" else config.score]
        more = {"score": handle_negative(raw_F, config.negative), "sign": raw_F.sign()}
        if config.negative == "drop":
            more["dropped"] = self.correlation <= 0
        return replace(self, by_feature={**self.by_feature, **more})

    def allowed(self, min_frequency: float) -> Tensor:
        """Features [C] active often enough to be steered, and not dropped; in order of index."""
        may_F = self.by_feature["frequency"] >= min_frequency
        if "dropped" in self.by_feature:
            may_F &= ~self.by_feature["dropped"]
        return may_F.nonzero()[:, 0]

    def best(self, min_frequency: float, k: int = 1) -> list[int]:
        """The k allowed features with the highest score, best first."""
        allowed_C = self.allowed(min_frequency)
        order = self.score[allowed_C].argsort(descending=True, stable=True)
        return allowed_C[order[:k]].tolist()

    def save(self, path: Path) -> None:
        """Write atomically: a reader sees the whole file or none."""
        from safetensors.torch import save

        meta: dict[str, Any] = {name: getattr(self, name) for name in _SCALARS}
        meta["moments"] = {name: getattr(self.moments, name) for name in _MOMENT_SCALARS}
        tensors = {f"feature.{k}": v.contiguous() for k, v in self.by_feature.items()}
        tensors |= {f"moments.{name}": getattr(self.moments, name) for name in MOMENT_TENSORS}
        tensors |= {"mean_D": self.mean_D, "std_D": self.std_D}
        written = save(tensors, metadata={"statistics": json.dumps(meta)})
        with replacing(path, path.with_suffix(f".{os.getpid()}.partial")) as file:
            file.write(written)

    @classmethod
    def load(cls, path: Path) -> LayerStatistics:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file

        from crl_exp.steering.feature_statistics.correlation import Moments

        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads(file.metadata()["statistics"])
            tensors = load_file(path)
            mean_D, std_D = tensors.pop("mean_D"), tensors.pop("std_D")
            parts: dict[str, Any] = {k: tensors.pop(f"moments.{k}") for k in MOMENT_TENSORS}
            moments = Moments(**meta.pop("moments"), **parts)
            features = {k.removeprefix("feature."): v for k, v in tensors.items()}
            return cls(**meta, mean_D=mean_D, std_D=std_D, moments=moments, by_feature=features)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"stored warmup statistics {path} can't be read ({error}); delete the file"
            ) from error


_SCALARS = ("layer", "n", "accuracy", "median_norm", "norm_mean", "norm_std")
_MOMENT_SCALARS = ("n", "origin_y", "mean_y", "m2_y")
MOMENT_TENSORS = ("origin_F", "mean_F", "m2_F", "cov_F")


class PartialPass:
    """A pass over the training prompts that isn't at its end, beside the statistics it is to make.

    Only for who holds the store's lock. names: files of the layers that it measures.
    """

    def __init__(self, home: Path, names: list[str]):
        self.home, self.names = home, names
        self.own = self._checkpoint(home / f"partial_{content_key(names)}.pt")

    def _checkpoint(self, path: Path) -> Checkpoint:
        return Checkpoint(path, self.home.name, f"delete {path}")

    def save(self, state: dict[str, Any]) -> None:
        self.own.save({**state, "names": self.names})

    def load(self) -> dict[str, Any] | None:
        """What a run that ended left of these layers, perhaps among others; None: nothing."""
        # Of one that died between two renames there is only the one before it.
        there = {p.with_name(p.name.replace(".prev", "")) for p in self.home.glob("partial_*.pt")}
        for path in sorted(there, key=lambda p: (p != self.own.path, p.name)):
            state = self._checkpoint(path).load()
            if state is not None and set(self.names) <= set(state["names"]):
                return state
        return None

    def clear(self) -> None:
        """Remove every pass whose layers are all stored."""
        for path in self.home.glob("partial_*.pt"):
            state = read_state(path, self.own.key, self.own.advice)
            if state is None or all((self.home / name).exists() for name in state["names"]):
                path.unlink()


Compute = Callable[["dict[int, LayerSAE]", PartialPass], dict[int, LayerStatistics]]
"""Measures these layers, going on from and saving the pass."""


def stored_at(output_dir: Path, config: WarmupConfig, depends_on: list[Any]) -> Path:
    """Folder of what stage 1 found. depends_on: what the unsteered training answers depend on."""
    asked = [*depends_on, config.pooling, STATISTICS_FORMAT, config.rewarded]
    if config.score in KEPT:
        asked.append(f"{KEPT[config.score]} kept")
    if config.contrast != "reward":
        asked.append(f"contrast {config.contrast}")
    return output_dir / "shared" / "warmup" / content_key(asked)


def shared_statistics(
    folder: Path, key: str, saes: dict[int, LayerSAE], compute: Compute
) -> dict[int, LayerStatistics]:
    """Load the layers that are stored under this content key; compute and store the others.

    Locked, so that runs starting together compute a layer once. What a run leaves half done when
    it ends is gone on with by the next one that wants these layers.
    """
    home = folder / key
    with writing(home):
        home.mkdir(parents=True, exist_ok=True)
    with locked(home / ".lock"):
        missing = {la: sae for la, sae in saes.items() if not _file(home, sae).exists()}
        if missing:
            partial = PartialPass(home, sorted(_file(home, s).name for s in missing.values()))
            for layer, statistics in compute(missing, partial).items():
                statistics.save(_file(home, saes[layer]))
            partial.clear()
    return {layer: LayerStatistics.load(_file(home, sae)) for layer, sae in saes.items()}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock. Who waits for it can be asked to end."""
    lock = FileLock(str(path))
    while not lock.is_locked:
        preemption.check()
        with suppress(Timeout):
            lock.acquire(timeout=1.0)
    try:
        yield
    finally:
        lock.release()


def _file(home: Path, sae: LayerSAE) -> Path:
    """Named by all of the SAE that its features hang on: the weights, and what is read and how.

    What nearly every SAE is (the layer's own output, read as it is) isn't in the name.
    """
    of = [sae.site, sae.centered, sae.reading]
    usual = of == [sae.layer, False, []]
    more = "" if usual else f"_{content_key(of)}"
    return home / f"layer_{sae.layer}_{sae.digest}{more}.safetensors"
