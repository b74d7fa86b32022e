"""Sweeps of many finished runs, copied from one or a few: what the commands are timed on.

`python -m crl_exp.launcher.bench.finished_runs RUN [RUN …] FOLDER N` makes one by hand.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import yaml

from crl_exp.analysis.statistics import compare
from crl_exp.config import compatibility
from crl_exp.config.keys import NOT_IN_KEY, content_key
from crl_exp.runs.items import items_table

pc: Any = pyarrow.compute  # its functions are made when it is imported, unseen by type checkers
N_ITEMS, N_VALIDATION = 500, 100
SEEDS, LAYERS = 5, 20
RATE = ("algorithm", "lr_policy")
"""The option that is varied once seeds and layers are through; it must be in the config."""
COPIED = ("code.json", "data.json", "status.json", "heartbeat.json", "inputs.json")
Loader, Dumper = yaml.CSafeLoader, yaml.CSafeDumper


def make_sweep(
    templates: list[Path], folder: Path, n: int, n_items: int = N_ITEMS, seed: int = 0
) -> list[Path]:
    """Write `n` finished runs into `folder`, a sweep; returns their directories.

    They differ in seed, layer and learning rate, in this order, and are of the templates in turn.
    Keys are those of their configs, so that a launch knows them. All have the same `n_items` test
    items with the same unsteered rewards; steered rewards are drawn. templates: directories of
    finished runs that steer one layer, of the same model and task.
    """
    read = [_Template(path) for path in templates]
    draw = np.random.default_rng(seed)
    ids = {"test": [f"item{i:05d}" for i in range(n_items)],
           "validation": [f"check{i:05d}" for i in range(N_VALIDATION)]}  # fmt: skip
    before = {name: (draw.random(len(of)) < 0.5).astype(float) for name, of in ids.items()}
    made = []
    for i in range(n):
        template, place = read[i % len(read)], i // len(read)
        config = template.varied(folder, place)
        made.append(template.write(config, folder, ids, before, np.random.default_rng(seed + i)))
    return made


class _Template:
    """A finished run, read once."""

    def __init__(self, path: Path):
        self.path = path
        self.config: dict[str, Any] = yaml.load((path / "config.yaml").read_text(), Loader)
        self.result: dict[str, Any] = json.loads((path / "result.json").read_text())
        self.features: dict[str, Any] = json.loads((path / "features.json").read_text())
        self.layer = str(self.config["layers"]["layer"])
        self.journal = ""
        if (path / "journal.jsonl").exists():
            self.journal = (path / "journal.jsonl").read_text()
        self.interventions = None
        if (path / "interventions.parquet").exists():
            table = pq.read_table(path / "interventions.parquet")
            self.interventions = table.filter(pc.equal(table["split"], "test"))
        self.copied = {
            name: (path / name).read_bytes() for name in COPIED if (path / name).exists()
        }

    def varied(self, folder: Path, place: int) -> dict[str, Any]:
        """The config of the run at this place of the sweep."""
        config = copy.deepcopy(self.config)
        config["sweep_name"], config["output_dir"] = folder.name, str(folder.parent)
        config["seed"], config["layers"]["layer"] = place % SEEDS, place // SEEDS % LAYERS
        section, key = RATE
        config[section][key] = config[section][key] * (1 + place // (SEEDS * LAYERS))
        return config

    def write(
        self, config: dict[str, Any], folder: Path, ids: dict[str, list[str]],
        before: dict[str, np.ndarray], draw: np.random.Generator,
    ) -> Path:  # fmt: skip
        hashed = {key: value for key, value in config.items() if key not in NOT_IN_KEY}
        key = content_key(compatibility.hashed(hashed))
        layer = config["layers"]["layer"]
        path = folder / key
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(yaml.dump(config, Dumper=Dumper, sort_keys=False))
        after = {
            split: np.where(draw.random(len(was)) < 0.2 + 0.1 * draw.random(), 1.0, was)
            for split, was in before.items()
        }
        figures = {
            split: _figures(self.result if split == "test" else self.result["validation"],
                            before[split], after[split])
            for split in ids
        }  # fmt: skip
        result = {
            **self.result, **figures["test"], "validation": figures["validation"], "run_key": key,
            "sweep": folder.name, "layers": [layer], "seed": config["seed"],
            "by_layer": {
                name: {str(layer): value for value in by_layer.values()}
                for name, by_layer in self.result.get("by_layer", {}).items()
            },
        }  # fmt: skip
        (path / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        features = {str(layer): self.features[self.layer]} if self.features else {}
        (path / "features.json").write_text(json.dumps(features, indent=2) + "\n")
        if self.journal:
            text = self.journal.replace(f"layer_{self.layer}/", f"layer_{layer}/")
            (path / "journal.jsonl").write_text(text)
        for name, data in self.copied.items():
            (path / name).write_bytes(data)
        self._write_items(path, ids, before, after)
        if self.interventions is not None:
            self._write_interventions(path, ids["test"], before["test"], after["test"], layer)
        return path

    def _write_items(
        self, path: Path, ids: dict[str, list[str]], before: dict[str, np.ndarray],
        after: dict[str, np.ndarray],
    ) -> None:  # fmt: skip
        tables = [
            items_table(split, ids[split], before[split].tolist(), after[split].tolist(),
                        (before[split] != after[split]).tolist(), [""] * len(ids[split]))
            for split in ids
        ]  # fmt: skip
        pq.write_table(pa.concat_tables(tables), path / "items.parquet", compression="zstd")

    def _write_interventions(
        self, path: Path, ids: list[str], before: np.ndarray, after: np.ndarray, layer: int
    ) -> None:
        """The template's rows in turn, one a test item."""
        assert self.interventions is not None
        table = self.interventions
        if len(table):
            table = table.take(np.arange(len(ids)) % len(table))
            for name, values in (
                ("item", ids), ("reward_baseline", before), ("reward_steered", after),
                ("changed", before != after), ("layer", np.full(len(ids), layer)),
            ):  # fmt: skip
                at = table.schema.get_field_index(name)
                field = table.schema.field(at)
                table = table.set_column(at, field, pa.array(values, field.type))
        pq.write_table(table, path / "interventions.parquet", compression="zstd")


def _figures(of: dict[str, Any], was: np.ndarray, now: np.ndarray) -> dict[str, Any]:
    """A split's figures by the keys of a result, made of these rewards."""
    found = asdict(compare(was, now, was != now))
    found["delta_ci95"] = list(found["delta_ci95"])
    return {**{key: value for key, value in of.items() if key.startswith("invalid")}, **found}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="copy finished runs into a sweep of N")
    parser.add_argument("template", nargs="+", type=Path, help="directory of a finished run")
    parser.add_argument("folder", type=Path, help="of the sweep, which is made")
    parser.add_argument("n", type=int)
    parser.add_argument("--items", type=int, default=N_ITEMS, help="test items of a run")
    asked = parser.parse_args(argv)
    make_sweep(asked.template, asked.folder, asked.n, asked.items)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
