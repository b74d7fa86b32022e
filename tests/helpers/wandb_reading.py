"""What wandb wrote offline, read back from its log: a LevelDB log of its own records."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, START = 32768, 7
ENDS_WITHIN = 60.0  # seconds; it takes less than one
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class Written:
    """The one run that lies in a run directory.

    history: rows without what wandb adds. steps, times: wandb's own, of each row. axes: of each
    metric, the one that it is drawn over. whole: whether the run was ended there.
    """

    def __init__(self, run: Path):
        (self.folder,) = (run / "wandb").glob("*run-*")
        (path,) = self.folder.glob("*.wandb")
        # wandb's own process writes the end, and may do so after ours was told that it has.
        until = time.monotonic() + ENDS_WITHIN
        while not any(one.WhichOneof("record_type") == "exit" for one in records(path)):
            assert time.monotonic() < until, f"{path} has no end"
            time.sleep(0.05)
        self.history: list[dict[str, Any]] = []
        self.steps: list[int] = []
        self.times: list[float] = []
        self.runtimes: list[float] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.axes: dict[str, str] = {}
        self.no_summary: set[str] = set()
        self.kinds: set[str] = set()
        self.exit_code: int | None = None
        names: dict[int, str] = {}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            self.kinds.add(kind)
            if kind == "run":
                self.run = record.run
                self.config |= _values(record.run.config.update)
            elif kind == "config":
                self.config |= _values(record.config.update)
            elif kind == "history":
                row = _values(record.history.item)
                self.steps.append(row.pop("_step"))
                self.times.append(row.pop("_timestamp"))
                self.runtimes.append(row.pop("_runtime"))
                self.history.append(row)
            elif kind == "summary":
                self.summary |= _values(record.summary.update)
            elif kind == "metric":
                metric = record.metric
                names[len(names) + 1] = metric.name
                name = metric.name.replace("\\.", ".")
                self.axes[name] = metric.step_metric or names.get(metric.step_metric_index, "")
                if metric.summary.none:
                    self.no_summary.add(name)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    @property
    def whole(self) -> bool:
        return self.exit_code is not None

    def points(self, name: str) -> list[tuple[int, float]]:
        """Of a metric, in the order in which they were logged: place on its axis, and value."""
        return [(row[self.axes[name]], row[name]) for row in self.history if name in row]


def _values(items: Any) -> dict[str, Any]:
    made = {}
    for item in items:
        key = item.key or ".".join(item.nested_key)
        made[key] = json.loads(item.value_json)
    return made


def records(path: Path) -> Iterator[Any]:
    """A log that was cut off gives those that are whole."""
    from wandb.proto import wandb_internal_pb2 as protocol

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = START, b""
    while at + START <= len(data):
        left = BLOCK - at % BLOCK
        if left < START:
            at += left  # nothing begins in the last bytes of a block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + START : at + START + length]
        if kind == 0 or len(part) < length:
            return
        at += START + length
        parts = part if kind in (WHOLE, FIRST) else parts + part
        if kind in (WHOLE, LAST):
            made: Any = protocol.Record()  # type: ignore[attr-defined]
            made.ParseFromString(parts)
            yield made
