"""Stage 1: how every feature goes with success, stored and shared by all runs.

`crl_exp.measuring` makes the statistics. torch is imported where they are read and written: the
config's section is here too. Shapes: D d_model, F d_sae.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from crl_exp import preemption
from crl_exp.checkpoints import Checkpoint, read_state
from crl_exp.contrast import CONTRASTS
from crl_exp.errors import UserError, did_you_mean
from crl_exp.files import replacing, writing
from crl_exp.groups import REWARDED
from crl_exp.run_keys import content_key
from crl_exp.scores import KEPT, NEGATIVE, SCORES, handle_negative

if TYPE_CHECKING:
    from torch import Tensor

    from crl_exp.correlation import Moments
    from crl_exp.saes import LayerSAE

POOLINGS = ("max", "mean", "last_prompt")
STATISTICS_FORMAT = 3
"""Of the stored files: those of another format lie under other keys."""


@dataclass
class WarmupConfig:
    """How the statistics are made.

    pooling: of a feature's activations over an answer's tokens: max, mean, or last_prompt (the
        last prompt token alone).
    min_frequency: only features active in at least this share of the answers may be steered.
    keep: best features listed in features.json, for each layer.
    rewarded: which answers count as rewarded where rewards are between 0 and 1: positive, y > 0 as
        in CorrSteer; half, y >= .5. Where they are 0 or 1 both are the same. (r is of the reward
        itself.)
    contrast: what features are to go with. reward: with the reward, as in CorrSteer. benign: with
        the prompt being harmful (1) and not benign (0), whatever was answered; harmful prompts then
        stand for rewarded answers everywhere above and below, and in method=raw_residual. For tasks
        that train on both kinds: refusal, refusal_128, xstest.
    score: what features are ranked by, also across layers: pearson, or as baselines
        mutual_information (of being active and rewarded), fisher ((μ₁ − μ₀)² / (σ₁² + σ₀²)),
        mean_difference, composite (mean difference times the share of rewarded answers above the
        unrewarded mean); and the two of CorrSteer's table (arXiv 2508.12535) as its code has them:
        corrsteer_mutual_information (of the activation in logarithmic bins, after SPARE) and
        corrsteer_fisher (E[z²] of rewarded over E[z²] of unrewarded answers, after DSG). Where it
        enters the policy's logits a score other than r is divided by its largest size among the
        features that may be steered, of all steered layers together.
    negative: features with a negative score: keep them as they are, clip their score at 0, steer:
        rank them by their score's size and add them with a negative coefficient, of the size that
        they have in failure, or drop: only features with r > 0 may be steered, as in CorrSteer.
    """

    pooling: str
    min_frequency: float
    keep: int
    rewarded: str
    score: str
    negative: str
    contrast: str

    def faults(self) -> list[str]:
        found = []
        choices = (
            ("pooling", POOLINGS), ("rewarded", REWARDED), ("score", SCORES),
            ("negative", NEGATIVE), ("contrast", CONTRASTS),
        )  # fmt: skip
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

        from crl_exp.correlation import Moments

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
    return home / f"layer_{sae.layer}_{sae.digest}.safetensors"
