"""What the table of how SAEs fit a task's tokens says, cell by cell."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from crl_exp.analysis.sae_fit import TOKENS, SAEFit, TokenFit, from_result, warnings
from crl_exp.config.display import number
from crl_exp.report.comparison.rows import SweepComparison
from crl_exp.report.tables.cells import FurtherTable

TITLE = "Does the SAE fit these tokens?"
COLUMNS = (
    "layer", "tokens", "n", "explained variance", "one site before", "one site after", "L0",
)  # fmt: skip
NAMES = {"steered": "steered", "prompt": "prompts' others"}
NOTE = (
    "Explained variance: 1 for a perfect reconstruction by the SAE, 0 for the tokens' mean; of at "
    f"most {TOKENS} training tokens, outliers and each prompt's first token left out. Steered: the "
    "last prompt token and the unsteered answer, which stage 1 reads. One site before, after: the "
    "same SAE on the residual of the layer below and above, which should be less. L0: mean number "
    "of active features."
)
SEVERAL = "Runs whose training items differ have other tokens: means over them."


def fits_in(sweep: SweepComparison) -> dict[int, list[SAEFit]]:
    """By layer, what the runs measured, each different figure once."""
    found: dict[int, dict[str, SAEFit]] = {}
    for run in (run for row in sweep.rows for run in row.runs):
        for layer, fit in from_result(run.result or {}).items():
            found.setdefault(layer, {})[repr(fit)] = fit
    return {layer: list(found[layer].values()) for layer in sorted(found)}


def _mean(fits: list[SAEFit]) -> SAEFit:
    def of(name: str) -> TokenFit | None:
        given = [one for fit in fits if (one := fit.token_fits.get(name)) is not None]
        return _mean_of_tokens(given) if given else None

    return SAEFit(fits[0].layer, of("steered"), of("prompt"))


def _mean_of_tokens(fits: list[TokenFit]) -> TokenFit:
    values: dict[str, Any] = {}
    for field in fields(TokenFit):
        given = [value for fit in fits if (value := getattr(fit, field.name)) is not None]
        values[field.name] = float(np.mean(given)) if given else None
    return TokenFit(**values)


def fit_cells(layer: int, tokens: str, fit: TokenFit) -> list[str]:
    figures = (fit.explained_variance, fit.one_before, fit.one_after)
    return [
        str(layer), NAMES[tokens], number(fit.n, ".0f"),
        *[number(figure, ".2f") for figure in figures], number(fit.l0, ".1f"),
    ]  # fmt: skip


def fit_tables(sweep: SweepComparison) -> list[FurtherTable]:
    """A line for each layer and kind of tokens; none for runs without such figures (made before
    there were any, or by methods without stage 1)."""
    found = fits_in(sweep)
    if not found:
        return []
    fits = [_mean(of_layer) for of_layer in found.values()]
    lines = [
        fit_cells(fit.layer, tokens, one) for fit in fits for tokens, one in fit.token_fits.items()
    ]
    several = [SEVERAL] * any(len(of_layer) > 1 for of_layer in found.values())
    told = [f"{line[0].upper()}{line[1:]}." for line in warnings(fits)]
    return [FurtherTable(TITLE, "fit", COLUMNS, lines, [NOTE, *several, *told])]
