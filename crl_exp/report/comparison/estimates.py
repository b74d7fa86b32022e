"""Estimates of finished runs: their figures on a test set, and the rewards of its items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crl_exp.analysis.estimates import Estimates, Samples, as_float, ends_of
from crl_exp.runs.items import NoItemsError, rewards_of_seeds
from crl_exp.runs.records import Record


def split(run: Record, name: str | None) -> dict[str, Any]:
    """A run's figures on test (None), validation or a further test set."""
    assert run.result is not None
    if name is None:
        return run.result
    return run.result["validation"] if name == "validation" else run.result["test_sets"][name]


def delta_of(run: Record, name: str | None) -> tuple[float, tuple[float, float]]:
    """A run's own difference with its interval."""
    figures = split(run, name)
    return as_float(figures["delta"]), ends_of(figures)


def estimates(runs: Sequence[Record], name: str | None) -> Estimates:
    """name: of a further test set; None: test. Raises `UserError` where items are not the same."""
    figures = tuple(split(run, name) for run in runs)
    try:
        return Estimates(figures, Samples(*rewards_of_seeds(runs, name or "test")))
    except NoItemsError:
        return Estimates(figures, None)
