"""What is sent to MLflow, in requests of a size that it takes. Knows nothing of MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from crl_exp.tracking.sending.content import Point

# MLflow's own limits: points, and params or tags, of one request; characters of it and of a tag.
POINTS_A_REQUEST = 1000
TEXTS_A_REQUEST, REQUEST_CHARS = 100, 500_000
TAG_CHARS = 5000


def requests_of(found: list[Point]) -> Iterator[list[Point]]:
    """Points, in requests of a size that MLflow takes."""
    for start in range(0, len(found), POINTS_A_REQUEST):
        yield found[start : start + POINTS_A_REQUEST]


def chunks(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Params or tags in requests of a size that MLflow takes."""
    part: list[tuple[str, str]] = []
    chars = 0
    for key, value in texts:
        size = len(json.dumps([key, value]))
        if part and (len(part) == TEXTS_A_REQUEST or chars + size > REQUEST_CHARS):
            yield part
            part, chars = [], 0
        part.append((key, value))
        chars += size
    if part:
        yield part


def cut(texts: dict[str, str]) -> dict[str, str]:
    """Tags no longer than MLflow takes them."""
    return {k: v if len(v) <= TAG_CHARS else v[: TAG_CHARS - 1] + "…" for k, v in texts.items()}
