"""What was added to the residuals while an item was answered, from interventions.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crl_exp.config.errors import UserError
from crl_exp.runs.records import Record

COLUMNS = ("item", "token_index", "layer", "features", "left_alone", "coefficients", "delta_norm")


@dataclass
class Added:
    """At one layer of one item.

    tokens: that were steered there. doses: by feature the coefficient at each token that had it.
    norms: length of what was added at tokens where no feature says what it was. alone: tokens that
    the policy left alone.
    """

    layer: int
    tokens: int = 0
    doses: dict[int, list[float]] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    alone: int = 0

    def said(self) -> str:
        """`layer 18: feature 3290 × 29.3 at 1 of 1 tokens`."""
        parts = [
            f"feature {feature} × {_dose(doses)} at {len(doses)} of {self.tokens} tokens"
            for feature, doses in sorted(self.doses.items(), key=lambda one: -len(one[1]))
        ]
        moved = [norm for norm in self.norms if norm > 0]
        if moved:
            parts.append(
                f"a direction of length {_dose(moved)} at {len(moved)} of {self.tokens} tokens"
            )
        if self.alone:
            parts.append(f"left alone at {self.alone} of {self.tokens} tokens")
        return f"layer {self.layer}: {'; '.join(parts) or 'nothing'}"


def _dose(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def added(run: Record, split: str, ids: Sequence[str]) -> dict[str, list[Added]] | None:
    """By item id, layers ascending; nothing of items to which nothing was done.

    None where the run has no interventions.parquet, or has other splits in it alone (validation).
    """
    path = run.path / "interventions.parquet"
    if not path.exists():
        return None
    if not ids:  # of which no filter can be made
        return {}
    try:
        there = [name for name in COLUMNS if name in pq.read_schema(path).names]
        rows = pq.read_table(
            path, columns=there, filters=[("split", "==", split), ("item", "in", list(ids))]
        ).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path} is damaged ({error}); add resume=force to make this run again"
        ) from error
    if not rows and split == "validation":  # which is never kept token by token
        return None
    found: dict[str, dict[int, Added]] = {}
    for row in rows:
        one = found.setdefault(row["item"], {}).setdefault(row["layer"], Added(row["layer"]))
        _add(one, row)
    return {item: [of[layer] for layer in sorted(of)] for item, of in found.items()}


def _add(one: Added, row: dict[str, Any]) -> None:
    one.tokens += 1
    for feature, dose in zip(row["features"], row["coefficients"], strict=True):
        one.doses.setdefault(feature, []).append(dose)
    if row.get("left_alone"):
        one.alone += 1
    elif not row["features"]:
        one.norms.append(row.get("delta_norm") or 0.0)
