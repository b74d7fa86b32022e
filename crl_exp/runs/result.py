"""What a run found, of whatever kind of experiment: figures with intervals, and series over layers.

In result.json an undefined figure is null, with its reason in `undefined`; layers are text there,
as JSON has it, and numbers here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from crl_exp.config.display import undefined
from crl_exp.config.files import replacing

STEERING = "steering"
PRIMARY = "validation/accuracy"
"""Of a run that steers."""


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval. None: undefined. n: items, tokens or the like it is of."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def defined(self) -> bool:
        return not undefined(self.value)

    def plain(self) -> dict[str, Any]:
        """As result.json has it, without what isn't known."""
        more = {k: v for k, v in asdict(self).items() if k != "value" and v is not None}
        return {"value": self.value, **more}

    @classmethod
    def of(cls, plain: Any) -> Figure:
        """From what `plain` made, or a bare number."""
        if not isinstance(plain, Mapping):
            return cls(None if plain is None else float(plain))
        return cls(*(plain.get(name) for name in ("value", "low", "high", "n")))


@dataclass(frozen=True)
class Series:
    """One figure at each layer.

    name: what it is of (`probe`, `permuted_labels`). metric: `accuracy`, `auc`, …; a report draws
    those of one metric in one panel. unit: `share`, `nats`, …, or "". better: 1 where more is
    better, -1 where less is, 0 where neither. split: of the items. interval: how low and high were
    got (`wilson`, `quantiles`). reference: a value to hold it against, with its name.
    by_layer: ascending; -1 is the input of layer 0.
    """

    name: str
    metric: str
    by_layer: Mapping[int, Figure]
    unit: str = "share"
    better: int = 0
    split: str = "test"
    interval: str | None = None
    reference: float | None = None
    reference_name: str | None = None

    @property
    def key(self) -> str:
        """Its name in result.json and MLflow."""
        return f"{self.name}/{self.metric}" if self.name else self.metric

    @property
    def described(self) -> dict[str, Any]:
        """What is to be known of it besides its figures."""
        told = asdict(self)
        for name in ("name", "metric", "by_layer"):
            del told[name]
        return told


@dataclass
class Result:
    """kind: of experiment. primary: name, among `figures`, of the one that a sweeper optimises and
    a list sorts by: never one of the test items. series: over layers. said: sentences on it, made
    of the numbers. more: whatever else the kind keeps, by key of result.json."""

    kind: str
    primary: str
    figures: dict[str, Figure] = field(default_factory=dict)
    series: list[Series] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.primary not in self.figures:
            raise ValueError(f"primary={self.primary!r} is none of {', '.join(self.figures)}")

    def plain(self) -> dict[str, Any]:
        """As result.json has it, but for what the frame adds."""
        if self.kind == STEERING:
            return {"kind": self.kind, "primary": self.primary, **self.more}
        return {
            "kind": self.kind,
            "primary": self.primary,
            "figures": {name: figure.plain() for name, figure in self.figures.items()},
            "by_layer": {
                one.key: {str(layer): one.by_layer[layer].plain() for layer in sorted(one.by_layer)}
                for one in self.series
            },
            "series": {one.key: one.described for one in self.series},
            "said": self.said,
            **self.more,
        }

    @classmethod
    def steering(cls, figures: dict[str, Any]) -> Result:
        """Of a run that steers: its result.json holds these figures by their own keys."""
        return cls(STEERING, PRIMARY, _of_steering(figures), more=figures)

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Result:
        """From result.json, of whatever version. What a run that steers holds by its own keys is
        given by these names: `accuracy`, `delta`, `validation/accuracy`."""
        if plain.get("kind", STEERING) == STEERING:
            figures = _of_steering(plain)
            return cls(STEERING, PRIMARY, figures, list(read_series(plain)))
        figures = {name: Figure.of(one) for name, one in plain["figures"].items()}
        return cls(
            plain["kind"], plain["primary"], figures, list(read_series(plain)), plain["said"]
        )


def read_series(plain: Mapping[str, Any]) -> Iterator[Series]:
    """The series of a result.json, layers as numbers in their order."""
    described = plain.get("series") or {}
    for key, given in (plain.get("by_layer") or {}).items():
        figures = {int(layer): Figure.of(one) for layer, one in given.items()}
        name, _, metric = key.rpartition("/")
        told: dict[str, Any] = described.get(key) or {"unit": ""}
        yield Series(name, metric, dict(sorted(figures.items())), **told)


def _of_steering(plain: Mapping[str, Any]) -> dict[str, Figure]:
    found = {}
    for prefix, figures in (("", plain), ("validation/", plain["validation"])):
        n, (low, high) = figures["n"], figures["delta_ci95"]
        found[f"{prefix}accuracy"] = Figure(figures["accuracy_steered"], n=n)
        found[f"{prefix}accuracy_unsteered"] = Figure(figures["accuracy_baseline"], n=n)
        found[f"{prefix}delta"] = Figure(figures["delta"], low, high, n)
    return found


BY_LAYER = "by_layer.parquet"


def write_by_layer(path: Path, plain: Mapping[str, Any]) -> None:
    """A finished run's series as a table, a row for each figure at each layer; an undefined figure
    is null. plain: the whole result."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    same = {name: plain[name] for name in ("sweep", "run_key", "kind", "seed", "data_digest")}
    rows = [
        {**same, "name": one.name, "metric": one.metric, "layer": layer, **asdict(figure),
         **one.described}
        for one in Result.read(plain).series
        for layer, figure in one.by_layer.items()
    ]  # fmt: skip
    text, number, whole = pa.string(), pa.float64(), pa.int64()
    kinds = {"seed": whole, "layer": whole, "n": whole, "better": whole, "value": number,
             "low": number, "high": number, "reference": number}  # fmt: skip
    schema = pa.schema([(name, kinds.get(name, text)) for name in rows[0]])
    with replacing(path / BY_LAYER, path / f"{BY_LAYER}.partial") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema), file)


def objective(plain: Mapping[str, Any]) -> float | None:
    """What a sweeper such as Optuna's optimises: the primary figure. None where it is undefined."""
    result = Result.read(plain)
    primary = result.figures[result.primary]
    return primary.value if primary.defined else None
