"""What is on its way to one run of MLflow: tags, params and points, in as few requests as it takes.

A request costs MLflow's database about the same for one point as for hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from crl_exp.tracking.sending.content import Point
from crl_exp.tracking.sending.requests import POINTS_A_REQUEST, batches
from crl_exp.tracking.sending.sent import Sent


class Outbox:
    """Things to send, each with what is noted of it (in `sent`) once it is there, and not before.

    What was sent and not noted is known again by whoever sends next, as after a crash.
    """

    def __init__(self, client: Any, sent: Sent):
        self._client, self._sent = client, sent
        self._tags: dict[str, str] = {}
        self._params: dict[str, str] = {}
        self._points: list[Point] = []
        self._notes: list[Callable[[], None]] = []
        self.steps: dict[str, set[int]] = {}
        """Of points whose steps come in any order, those that were put in."""

    def put(
        self, note: Callable[[], None], points: Sequence[Point] = (),
        tags: Mapping[str, str] | None = None, params: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Put things in; full requests of points are sent at once."""
        self._tags |= tags or {}
        self._params |= params or {}
        self._points += points
        self._notes.append(note)
        if len(self._points) >= POINTS_A_REQUEST:
            self.flush()

    def put_steps(self, points: Iterable[Point]) -> None:
        """Put in points whose steps come in any order, which are noted one by one."""
        new = list(points)
        for point in new:
            self.steps.setdefault(point.name, set()).add(point.step)
        self.put(lambda: self._note_steps(new), new)

    def _note_steps(self, points: Sequence[Point]) -> None:
        noted: dict[str, list[int]] = self._sent.record.setdefault("steps", {})
        found: dict[str, set[int]] = {}
        for point in points:
            found.setdefault(point.name, set(noted.get(point.name, ()))).add(point.step)
        noted |= {name: sorted(steps) for name, steps in found.items()}

    def flush(self) -> None:
        """Send all, and note it."""
        from mlflow.entities import Metric, Param, RunTag

        for batch in batches(self._tags, self._params, self._points):
            self._client.log_batch(
                self._sent.record["run_id"],
                metrics=[Metric(p.name, p.value, p.time_ms, p.step) for p in batch.points],
                params=[Param(key, value) for key, value in batch.params],
                tags=[RunTag(key, value) for key, value in batch.tags],
            )
        for note in self._notes:
            note()
        if self._notes:
            self._sent.save()
        self._tags, self._params, self._points, self._notes = {}, {}, [], []
