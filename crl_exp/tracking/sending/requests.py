"""What is sent to MLflow, in requests of a size that it takes. Knows nothing of MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from crl_exp.tracking.sending.content import Point

# MLflow's own limits: points, and params or tags, of one request; characters of it and of a tag.
POINTS_A_REQUEST = 1000
TEXTS_A_REQUEST, REQUEST_CHARS = 100, 500_000
TAG_CHARS = 5000


def requests_of(found: Sequence[Point]) -> Iterator[Sequence[Point]]:
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


@dataclass
class Batch:
    """One request."""

    tags: list[tuple[str, str]]
    params: list[tuple[str, str]]
    points: Sequence[Point]

    @property
    def chars(self) -> int:
        return sum(len(json.dumps(pair)) for pair in (*self.tags, *self.params))


def batches(
    tags: Mapping[str, str], params: Mapping[str, str], points: Sequence[Point]
) -> list[Batch]:
    """All of these in requests of a size that MLflow takes, texts first.

    The points that fill no request go with the last texts, where these leave room.
    """
    texts = zip_longest(chunks(tags.items()), chunks(params.items()), fillvalue=())
    found = [Batch(list(some), list(others), ()) for some, others in texts]
    for part in requests_of(points):
        last = found[-1] if found else None
        if last is None or last.points or not _fits(last, part):
            found.append(Batch([], [], part))
        else:
            last.points = part
    return found


def _fits(batch: Batch, points: Sequence[Point]) -> bool:
    """Whether points may go with a request's texts: MLflow counts them together."""
    n = len(batch.tags) + len(batch.params) + len(points)
    return n <= POINTS_A_REQUEST and batch.chars <= REQUEST_CHARS


def cut(texts: dict[str, str]) -> dict[str, str]:
    """Tags no longer than MLflow takes them."""
    return {k: v if len(v) <= TAG_CHARS else v[: TAG_CHARS - 1] + "…" for k, v in texts.items()}
