"""What `status` tells of runs that share a process: no bar ends beyond its end, or short of it."""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crl_exp.__main__ import main
from crl_exp.experiments.packing import run_pack
from crl_exp.runs import heartbeat
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.heartbeat import Progress
from crl_exp.runs.preemption import Preempted
from tests.experiments.test_packing import configs, forget

SIZES = (2, 3, 5)
VARIANTS = [
    ["algorithm.n_updates=2", "layers=all", "fusion=attention"],
    ["algorithm.n_updates=3", "layers=best_on_validation", "layers.among=[0,2]"],
    ["algorithm.n_updates=5", "algorithm=grpo", "algorithm.prompts_per_update=4"],
]


@pytest.mark.slow
def test_no_bar_of_a_pack_goes_beyond_its_end(tiny_files, tmp_path, monkeypatch, capsys):
    """Three runs of other lengths; the longest is cancelled in the middle of its training and goes
    on with the others done. Every heartbeat is looked at, and each bar after each of its steps."""
    told: list[dict[str, Any]] = []
    ends: dict[str, set[tuple[int, int]]] = defaultdict(set)
    packed = configs(tiny_files, tmp_path, VARIANTS, "sweep_name=three")
    runs = [RunDirectory(config) for config in packed]
    longest, cancelled = runs[-1], threading.Event()
    advance, bar, write = Progress.advance, Progress.bar, heartbeat.write_json

    def advanced(self: Progress, n: int) -> None:
        advance(self, n)
        told.append(self.told())
        here = (self.what, self.done, self.total) == ("training", 2, SIZES[-1])
        if here and not cancelled.is_set():
            cancelled.set()
            longest.cancel_path.touch()

    @contextmanager
    def to_its_end(self: Progress, what: str, total: int):
        with bar(self, what, total):
            yield
            ends[what].add((self.done, total))

    def written(path: Path, value: dict[str, Any]) -> None:
        told.append(value)
        write(path, value)

    monkeypatch.setattr(Progress, "advance", advanced)
    monkeypatch.setattr(Progress, "bar", to_its_end)
    monkeypatch.setattr(heartbeat, "write_json", written)
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.002)
    forget()
    *shorter, ended = run_pack(packed)
    assert all(isinstance(outcome, dict) for outcome in shorter), shorter
    assert isinstance(ended, Preempted) and ended.cancelled
    shown = status_of(tmp_path, capsys)
    assert shown == [(2, SIZES[-1])], "the one that isn't done"
    assert isinstance(run_pack(packed)[-1], dict)
    beyond = [beat for beat in told if beat["done"] > beat["total"]]
    assert not beyond, beyond[0]
    assert all(done == total for pairs in ends.values() for done, total in pairs), dict(ends)
    assert ends["training"] == {(n, n) for n in SIZES}
    assert {beat["total"] for beat in told if beat["what"] == "training"} == set(SIZES)
    assert all((beat["left_seconds"] or 0) >= 0 for beat in told)


def status_of(output_dir: Path, capsys) -> list[tuple[int, int]]:
    """Steps done and in all, as `status` shows them."""
    capsys.readouterr()
    assert main(["status", "three", "--output-dir", str(output_dir)]) == 0
    said = capsys.readouterr().out
    return [(int(a), int(b)) for a, b in re.findall(r"train (\d+)/(\d+)", said)]
