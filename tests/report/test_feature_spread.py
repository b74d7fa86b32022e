"""Intervals of figures of features: items and seeds in them, against what repeating gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crl_exp.experiments.kinds.evaluation import INTERVENTIONS
from crl_exp.report.comparison.feature_spread import spread_over_items
from crl_exp.report.comparison.feature_use import LayerUse
from crl_exp.runs.records import Record

FEATURES = tuple({"feature": f, "correlation": 0.1 * f} for f in range(5))


def run(folder: Path, feature_of_item: np.ndarray, seed: int = 0) -> LayerUse:
    """A run that added one feature to each item, and what it says of its layer."""
    path = folder / f"run_{seed}"
    path.mkdir(parents=True)
    n = len(feature_of_item)
    empty = {name: [None] * n for name in INTERVENTIONS.names}
    rows = {**empty, "split": ["test"] * n, "item": [f"i{i}" for i in range(n)], "layer": [3] * n,
            "features": [[int(f)] for f in feature_of_item]}  # fmt: skip
    pq.write_table(pa.table(rows, schema=INTERVENTIONS), path / "interventions.parquet")
    counts = np.bincount(feature_of_item, minlength=5)
    used = tuple({**FEATURES[f], "tokens": int(counts[f])} for f in range(5) if counts[f])
    return LayerUse(3, Record(path), FEATURES[:2], used, 40)


def added(use: LayerUse) -> float:
    return use.metrics()["additions_found"]


def test_one_seed_has_the_interval_of_its_items(tmp_path):
    features = np.random.default_rng(0).choice(5, size=4000, p=[0.4, 0.2, 0.2, 0.1, 0.1])
    found, items_in = spread_over_items([run(tmp_path, features)], added)
    share = (features < 2).mean()
    assert items_in and found.mean == pytest.approx(share)
    half = 1.96 * np.sqrt(share * (1 - share) / 4000)  # of a share of 4,000 items
    assert found.half() == pytest.approx(half, rel=0.5)
    assert found.v_seeds == 0


def test_items_that_all_seeds_agree_on_don_t_shrink_with_seeds(tmp_path):
    features = np.random.default_rng(1).choice(5, size=4000, p=[0.4, 0.2, 0.2, 0.1, 0.1])
    one, _ = spread_over_items([run(tmp_path / "one", features)], added)
    uses = [run(tmp_path / "four", features, seed) for seed in range(4)]
    four, _ = spread_over_items(uses, added)
    assert four.interval == pytest.approx(one.interval)


def test_seeds_that_differ_widen_it(tmp_path):
    draw = np.random.default_rng(2)
    uses = [run(tmp_path, draw.choice(5, 4000, p=[p, 0.1, 0.9 - p, 0, 0]), seed)
            for seed, p in enumerate((0.3, 0.5, 0.7))]  # fmt: skip
    found, _ = spread_over_items(uses, added)
    # Shares of .4, .6, .8: t(2) = 4.303 times .2 / √3
    assert found.half() == pytest.approx(4.303 * 0.2 / 3**0.5, rel=0.1)


def test_without_interventions_it_is_over_seeds_and_says_so(tmp_path):
    use = run(tmp_path, np.zeros(10, dtype=int))
    (use.record.path / "interventions.parquet").unlink()
    found, items_in = spread_over_items([use], added)
    assert not items_in and found.interval == (1.0, 1.0)
