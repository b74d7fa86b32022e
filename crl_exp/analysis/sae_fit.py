"""Does an SAE fit the tokens of a task? Explained variance, L0, and the same one site off.

`saes.fit` measures, `feature_statistics.fit` gathers the tokens. An SAE that reconstructs them
badly has features that say little about them; one that reconstructs a neighbouring site better
than its own was probably trained there. Shapes: N tokens, S sites, D d_in, F d_sae.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TOKENS = 256
"""Most tokens that a figure is of."""
FLOOR = 0.3
"""An explained variance below is warned of."""
SERIES = "sae_fit"
"""Of the names in a result's `by_layer`."""


@dataclass(frozen=True)
class TokenFit:
    """How an SAE fits some tokens.

    n: of them. left_out: outliers. explained_variance: at its own site; NaN where the tokens don't
    differ. l0: mean number of active features. one_before, one_after: explained variance of the
    residuals one site off, where there is such a site.
    """

    n: int
    left_out: int
    explained_variance: float
    l0: float
    one_before: float | None = None
    one_after: float | None = None

    def better_off(self) -> tuple[str, float] | None:
        """The neighbouring site that is explained more than the SAE's own, and how much.

        None also where neither is better than its mean (0): which of two SAEs that explain nothing
        is worse tells nothing of the site.
        """
        sites = {"one site before": self.one_before, "one site after": self.one_after}
        there = {name: value for name, value in sites.items() if value is not None}
        if not there:
            return None
        best = max(there, key=lambda name: there[name])
        least = max(self.explained_variance, 0.0)
        return (best, there[best]) if there[best] > least else None


@dataclass(frozen=True)
class SAEFit:
    """How a layer's SAE fits a task's tokens.

    steered: the tokens that stage 1 reads: of training items the last prompt token and those of
    the unsteered answer. prompt: tokens of their prompts before the last. None: not known, as where
    a prompt has no others.
    """

    layer: int
    steered: TokenFit | None
    prompt: TokenFit | None

    @staticmethod
    def of(plain: Mapping[str, Any]) -> SAEFit:
        """From what `asdict` made, as JSON has it. Raises KeyError, TypeError for other things."""
        steered, prompt = (
            None if (given := plain[name]) is None
            else TokenFit(**{**given, "explained_variance": _number(given["explained_variance"])})
            for name in ("steered", "prompt")
        )  # fmt: skip
        return SAEFit(plain["layer"], steered, prompt)

    @property
    def token_fits(self) -> dict[str, TokenFit]:
        """Those that are known, by the name of the tokens."""
        found = {"steered": self.steered, "prompt": self.prompt}
        return {name: one for name, one in found.items() if one is not None}

    @property
    def verdict(self) -> str | None:
        """`off`: a neighbouring site is explained more than the SAE's own. `poor`: explained
        variance below `FLOOR`. `poor_where_steered`: only at the steered tokens. None: it fits."""
        if any(one.better_off() for one in self.token_fits.values()):
            return "off"
        steered = None if self.steered is None else self.steered.explained_variance
        if steered is None or math.isnan(steered):  # unknown: the prompts' tokens alone tell
            prompt = self.prompt
            return "poor" if prompt and prompt.explained_variance < FLOOR else None
        if steered >= FLOOR:
            return None
        if self.prompt is not None and self.prompt.explained_variance >= FLOOR:
            return "poor_where_steered"
        return "poor"

    def shown(self) -> str:
        """`layer 8: 0.81 at the steered tokens, 0.89 at the prompts' others`."""
        words = {"steered": "at the steered tokens", "prompt": "at the prompts' others"}
        parts = []
        for name, one in self.token_fits.items():
            off = one.better_off()
            more = f" but {off[1]:.2f} {off[0]}" if off else ""
            parts.append(f"{one.explained_variance:.2f} {words[name]}{more}")
        return f"layer {self.layer}: {', '.join(parts)}"


def evenly(n: int, most: int) -> list[int]:
    """At most so many of n places, spread evenly: what comes first may be of one kind."""
    return list(range(n)) if n <= most else [i * n // most for i in range(most)]


# --- what is said of it ---

LITTLE = f"the SAE's reconstruction explains less than {FLOOR} of the residual's variance"
HEADS = {
    "off": "the SAE explains more of the residual one site off than at its own hook",
    "poor": LITTLE,
    "poor_where_steered": f"{LITTLE} at the steered tokens, though more at others",
}
"""What is wrong, by verdict."""
MEANINGS = {
    "off": (
        "It was probably trained there, so that features are read and added at the wrong site: "
        "name the SAE of this very hook (sae.id_template=…, sae.folder=…, sae.release=…), steer "
        "the layer that it belongs to (layers.layer=…), or correct hook_name in its cfg.json "
        "(hidden_states[L + 1] of transformers is blocks.L.hook_resid_post)"
    ),
    "poor": (
        "Its features say little about these tokens. It may be a base model's SAE on an "
        "instruction-tuned model, of another hook or input scale, or have seen no such text: "
        "choose one of this model and hook (sae=…, sae.release=…, sae.id_template=…)"
    ),
    "poor_where_steered": (
        "It is of the right site, but what tells these items apart where they are steered is "
        "mostly in its error, which no feature adds: choose another layer (layers.layer=…)"
    ),
}


def warnings(fits: Iterable[SAEFit]) -> list[str]:
    """A line for each kind of misfit: its layers, what it means, and what mends it."""
    found, told = list(fits), []
    for verdict, head in HEADS.items():
        those = [fit for fit in found if fit.verdict == verdict]
        if those:
            figures = "; ".join(fit.shown() for fit in those)
            trained = "" if verdict == "off" else _training([fit.layer for fit in those])
            told.append(f"{head} ({figures}). {MEANINGS[verdict]}{trained}")
    return told


def _training(layers: list[int]) -> str:
    able = ",".join(str(layer) for layer in layers if layer > 0)  # the recipe's are from 1 on
    command = f"`python -m crl_exp train-sae 'layers=[{able}]' out=saes/mine`"
    return f", or train one ({command}, then sae=disk sae.folder=saes/mine)" if able else ""


# --- in a result ---


def by_layer(fits: Mapping[int, SAEFit]) -> dict[str, dict[str, dict[str, Any]]]:
    """As a result's `by_layer` holds it: `sae_fit/TOKENS/FIGURE`, by layer {"value", "n", …}."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for layer, fit in sorted(fits.items()):
        for tokens, one in fit.token_fits.items():
            for name in ("explained_variance", "l0", "one_before", "one_after"):
                if (value := getattr(one, name)) is not None:
                    figure = {"value": value, "n": one.n, "left_out": one.left_out}
                    found.setdefault(f"{SERIES}/{tokens}/{name}", {})[str(layer)] = figure
    return found


def from_result(result: Mapping[str, Any]) -> dict[int, SAEFit]:
    """What `by_layer` wrote; {} of a run without stage 1, or of before there were such figures."""
    series = result.get("by_layer") or {}
    layers = sorted({int(n) for name in series if _ours(name) for n in series[name]})

    def token_fit(tokens: str, layer: int) -> TokenFit | None:
        names = ("explained_variance", "l0", "one_before", "one_after")
        given = {n: (series.get(f"{SERIES}/{tokens}/{n}") or {}).get(str(layer)) for n in names}
        own = given["explained_variance"]
        if own is None:
            return None
        value = {n: None if one is None else _number(one["value"]) for n, one in given.items()}
        return TokenFit(own["n"], own["left_out"], **value)  # type: ignore[arg-type]

    return {la: SAEFit(la, token_fit("steered", la), token_fit("prompt", la)) for la in layers}


def _ours(name: str) -> bool:
    return name.startswith(f"{SERIES}/")


def _number(value: float | None) -> float:
    """A figure of a file, where an undefined one is null."""
    return math.nan if value is None else value
