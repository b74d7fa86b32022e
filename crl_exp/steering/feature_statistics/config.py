"""How stage 1's statistics are made: the config's section, which is read without torch."""

from __future__ import annotations

from dataclasses import dataclass

from crl_exp.analysis.moments import REWARDED
from crl_exp.config.errors import did_you_mean
from crl_exp.steering.feature_statistics.contrast import CONTRASTS

SCORES = (
    "pearson", "mutual_information", "fisher", "mean_difference", "composite",
    "corrsteer_mutual_information", "corrsteer_fisher",
)  # fmt: skip
NEGATIVE = ("keep", "clip", "steer", "drop")
POOLINGS = ("max", "mean", "last_prompt")


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
        the prompt being harmful (1) and not benign (0), whatever was answered. refused: with the
        prompt being refused (1), harmful or not. Harmful or refused prompts then stand for rewarded
        answers everywhere above and below, and in method=raw_residual. For tasks that train on both
        kinds (refusal, refusal_128, xstest), where the reward of a model that refuses little goes
        mostly with the prompt being benign.
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
