"""Fetches Neuronpedia's explanations of an SAE's features, from its bulk exports.

One request a file of them, none a feature (docs.neuronpedia.org/api-and-data/exports).
"""

from __future__ import annotations

import gzip
import http.client
import json
import os
import urllib.parse
import urllib.request
import zlib
from pathlib import Path
from xml.etree import ElementTree

from crl_exp.config.errors import UserError
from crl_exp.config.files import write_atomic
from crl_exp.report.feature_labels import kept_at, labels_of

EXPORTS = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"
MIRROR = "CRL_EXP_NEURONPEDIA"
"""Environment variable that names another place of the same layout."""
TIMEOUT, LONGEST, LARGEST = 30, 300, 200_000_000


class UnreachableError(UserError):
    """The exports can't be had: other sources needn't be asked for."""


def fetch_labels(source: str) -> int:
    """Fetch an SAE's labels, unless they are there; returns how many features have one.

    Where an export holds explanations of several models, those in `explanations/` are taken, else
    the first by name; of several of one feature, the first.
    Raises `UserError` where they can't be had.
    """
    path = kept_at(source)
    if path.exists():
        return len(labels_of(source))
    try:
        return _fetched(source, path)
    except (
        ElementTree.ParseError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, LookupError,
        AttributeError,
    ) as error:  # fmt: skip
        raise UserError(
            f"Neuronpedia's export of {source} can't be read ({type(error).__name__}: {error})"
        ) from error


def _fetched(source: str, path: Path) -> int:
    base = os.environ.get(MIRROR, EXPORTS).rstrip("/")
    if not base.startswith(("https://", "http://")):
        raise UserError(f"{MIRROR}={base}: must be an address, https://…")
    keys = _keys(base, f"v1/{source}/explanations")
    folders = sorted({key.rpartition("/")[0] for key in keys}, key=lambda f: (len(f), f))
    if not folders:
        raise UserError(f"Neuronpedia's exports have no explanations of {source}")
    labels: dict[str, str] = {}
    for key in sorted(key for key in keys if key.rpartition("/")[0] == folders[0]):
        for line in gzip.decompress(_get(f"{base}/{urllib.parse.quote(key)}")).splitlines():
            found = json.loads(line)
            text = " ".join(str(found.get("description") or "").split())[:LONGEST]
            if text:
                labels.setdefault(str(found["index"]), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"from": f"{base}/{folders[0]}", "labels": labels}
    write_atomic(path, json.dumps(kept, ensure_ascii=False))
    return len(labels)


def _keys(base: str, prefix: str) -> list[str]:
    """Names of a bucket's files below a prefix (S3's ListObjectsV2)."""
    found: list[str] = []
    more: str | None = ""
    while more is not None:
        asked = {"list-type": "2", "prefix": prefix}
        if more:
            asked["continuation-token"] = more
        listing = ElementTree.fromstring(_get(f"{base}/?{urllib.parse.urlencode(asked)}"))
        found += [one.text or "" for one in listing.iterfind("{*}Contents/{*}Key")]
        more = listing.findtext("{*}NextContinuationToken")
    return [key for key in found if key.endswith(".jsonl.gz")]


def _get(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            data = answer.read(LARGEST + 1)
    except (OSError, http.client.HTTPException) as error:  # timeouts and urllib's own included
        raise UnreachableError(
            f"{address}: {error}. Behind a mirror set {MIRROR}=https://…; runs need no labels"
        ) from error
    if len(data) > LARGEST:
        raise UserError(f"{address}: more than {LARGEST:,} bytes, which no export has")
    return data
