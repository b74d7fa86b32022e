"""What features are called: Neuronpedia's explanations of an SAE, where they were fetched, and
labels of a judge, with how well they tell texts apart.

`python -m crl_exp prefetch` fetches the former; a report looks them up by the page that a feature
is linked to. `python -m crl_exp label` makes the latter, in the run's folder. Neither asks a
network here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from crl_exp.config.errors import UserError
from crl_exp.config.files import read_json
from crl_exp.config.machine.assets import cache_dir

SITE = "https://www.neuronpedia.org/"
JUDGED = "feature_labels.json"
"""In a run's folder: labels of a judge, by LAYER/INDEX."""
_NAME = re.compile(r"[\w.-]+/[\w.-]+$")


def label_of(link: str | None) -> str | None:
    """The label of the feature that a Neuronpedia page shows; None where none was fetched."""
    if link is None or not link.startswith(SITE):
        return None
    source, _, feature = link.removeprefix(SITE).rpartition("/")
    return labels_of(source).get(feature)


def judged_label(folders: Iterable[Path], layer: int, feature: int) -> str | None:
    """The judge's label of a feature with its score, from the first of these runs that has one.

    Raises `UserError` where a file is damaged.
    """
    for folder in folders:
        found = (read_json(folder / JUDGED, "remove it") or {}).get(f"{layer}/{feature}")
        if found is not None:
            low, high = found["interval"]
            return (
                f"{found['label']} (by {found['model']}; detection "
                f"{found['balanced_accuracy']:.2f} [{low:.2f}, {high:.2f}], n {found['n']}, "
                "chance .5)"
            )
    return None


def labels_of(source: str) -> dict[str, str]:
    """Labels of an SAE's features by index, as far as they were fetched. source: Neuronpedia's
    `MODEL/SOURCE`. Raises `UserError` where the file is damaged."""
    path = kept_at(source)
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        return {}
    return _read(path, stamp)


def kept_at(source: str) -> Path:
    """Where an SAE's labels lie. Raises `UserError` where it is no source's name."""
    if not _NAME.match(source) or ".." in source:
        raise UserError(f"{source!r} is no source of Neuronpedia, as in gemma-2-2b/12-res-16k")
    model, name = source.split("/")
    return cache_dir() / "labels" / model / f"{name}.json"


@lru_cache(maxsize=64)
def _read(path: Path, stamp: int) -> dict[str, str]:
    try:
        labels = json.loads(path.read_bytes())["labels"]
        return {str(feature): str(text) for feature, text in labels.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it, and fetch it again by "
            "`python -m crl_exp prefetch`"
        ) from error
