"""Lists of features to add: typed, in a CSV file, or those that a finished run steered by.

A CSV file has the columns `layer, feature, coefficient`, and `list` where it holds several. A card
beside it, of the same name with `.json`, may name the SAE that the numbers belong to:
{"sae": {"release": …, "id_template": …, "d_sae": …}}, so that no other is steered by them. A run's
features.json belongs to the SAE of the config beside it.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.files import home
from crl_exp.config.keys import read_config
from crl_exp.config.paths import here_or_shipped
from crl_exp.runs.records import rows_of_run
from crl_exp.tasks.data.files import users_text

COLUMNS = ("layer", "feature", "coefficient")


@dataclass(frozen=True)
class ListedFeature:
    """One feature of a layer and the coefficient that its row of W_dec is added with."""

    layer: int
    feature: int
    coefficient: float


@dataclass(frozen=True)
class FeatureList:
    """where: what messages call it. sae: what its card says of the SAE; {} where nothing does."""

    where: str
    features: tuple[ListedFeature, ...]
    sae: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return sorted({one.layer for one in self.features})

    def faults(self) -> list[str]:
        """What no SAE could mend: nothing listed, or something twice."""
        if not self.features:
            return [f"{self.where} is empty; give rows of layer, feature and coefficient"]
        counts = Counter((one.layer, one.feature) for one in self.features)
        return [
            f"{self.where}: layer {layer}, feature {feature} is there {count} times; keep one"
            for (layer, feature), count in counts.items()
            if count > 1
        ]


def typed_list(rows: Sequence[Any]) -> FeatureList:
    """`method.features=[[layer, feature, coefficient], …]`. Raises `UserError` for other shapes."""
    return FeatureList("method.features", tuple(_features(rows, "method.features")))


def read_list(path: str, name: str | None) -> FeatureList:
    """A CSV file or a run's features.json; a relative path is looked for in the working directory,
    then in the checkout or in what the wheel ships.

    name: of the list, in a CSV file that holds several.

    Raises `UserError` where it can't be read, with what is wrong and where.
    """
    file = list_file(path)
    try:
        if file.suffix == ".json":
            return _of_run(file, name)
        return _of_csv(file, name)
    except csv.Error as error:
        raise UserError(f"method.path={path}: is no CSV ({error})") from error


def list_file(path: str) -> Path:
    """The file that `method.path` names. Raises `UserError` where there is none."""
    file = here_or_shipped(home(path, "method.path"))
    if file.is_dir():
        file = file / "features.json"
    if not file.is_file():
        raise UserError(f"method.path={path}: there is no such file")
    return file


def _of_csv(file: Path, name: str | None) -> FeatureList:
    rows = list(csv.DictReader(io.StringIO(users_text(file, "method.path"), newline="")))
    there = list(rows[0]) if rows else []
    if missing := [column for column in COLUMNS if rows and column not in there]:
        raise UserError(
            f"{file} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}"
            f"{did_you_mean(missing[0], there)}; it has {', '.join(there)}"
        )
    lists = list(dict.fromkeys(row["list"] for row in rows)) if "list" in there else []
    if name is None and len(lists) > 1:
        raise UserError(f"{file} holds the lists {', '.join(lists)}; choose one: method.which=…")
    if name is not None and name not in lists:
        known = f"it has {', '.join(lists)}" if lists else "it has no column `list`"
        raise UserError(
            f"method.which={name}: {file} holds no such list{did_you_mean(name, lists)} ({known})"
        )
    chosen = [
        (number, row)
        for number, row in enumerate(rows, start=2)
        if name is None or row["list"] == name
    ]
    found = [
        one
        for number, row in chosen
        for one in _features([[row[c] for c in COLUMNS]], f"{file}, line {number}")
    ]
    return FeatureList(f"{file}{f' ({name})' if name else ''}", tuple(found), _card(file))


def _card(file: Path) -> dict[str, Any]:
    card = file.with_suffix(".json")
    if not card.is_file():
        return {}
    said = _json(card)
    sae = said.get("sae") if isinstance(said, dict) else None
    if not isinstance(sae, dict):
        raise UserError(f'{card}: must be {{"sae": {{"release": …, "d_sae": …}}}}')
    return sae


def _of_run(file: Path, name: str | None) -> FeatureList:
    """What a run steered by: its own coefficients where it added fixed features, else at each layer
    the feature that it added at the most tokens, with the mean of its coefficients there."""
    if name is not None:
        raise UserError(f"method.which={name}: {file} holds one list; set method.which=null")
    said = _json(file)
    if not isinstance(said, dict) or not all(isinstance(one, dict) for one in said.values()):
        raise UserError(f"{file} is not a run's features.json")
    try:
        rows = rows_of_run(said)
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is not a run's features.json ({error!r})") from error
    return FeatureList(str(file), tuple(_features(rows, str(file))), _sae_of_run(file.parent))


def _sae_of_run(folder: Path) -> dict[str, Any]:
    config = folder / "config.yaml"
    if not config.is_file():
        return {}
    sae = read_config(config).sae
    found = {key: sae.get(key) for key in ("name", "release", "folder", "id_template")}
    return found | {"dictionary": sae.get("dictionary", "sae")}


def _json(file: Path) -> Any:
    text = users_text(file, "method.path")
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error})") from error


def _features(rows: Iterable[Any], where: str) -> list[ListedFeature]:
    found = []
    for row in rows:
        try:
            layer, feature, coefficient = row
            one = ListedFeature(_whole(layer), _whole(feature), float(coefficient))
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{where}: {row!r} is not a layer, a feature and a coefficient, such as "
                "[18, 1204, 5.2]"
            ) from error
        if min(one.layer, one.feature) < 0 or not math.isfinite(one.coefficient):
            raise UserError(
                f"{where}: layer {layer}, feature {feature}, coefficient {coefficient}: layer and "
                "feature count from 0, and the coefficient is a finite number"
            )
        found.append(one)
    return found


def _whole(value: Any) -> int:
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError(value)
    return int(float(value))
