"""How `pytest -n` shares the tests among processes."""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

SLURM = "tests/slurm/"
# Files whose tests have little in common, and are run wherever there is room.
SPREAD = ("tests/config/test_config.py",)
LONG = ("slow", "assets", "gpu")


class Sharing(LoadScopeScheduling):
    """A file's tests stay together, for the sake of what they share. All tests on SLURM are one
    part: there is one cluster."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(SLURM):
            return SLURM
        return nodeid if nodeid.startswith(SPREAD) else nodeid.split("::")[0]


def long_ones_first(items: list[pytest.Item]) -> None:
    """Put the longest part first and the smallest last, so that no process ends long before the
    others."""
    long = {item for item in items if any(map(item.get_closest_marker, LONG))}
    long_files = {item.path for item in long}

    def place(item: pytest.Item) -> int:
        if item.nodeid.startswith(SLURM):
            return 0
        if item.nodeid.startswith(SPREAD):
            return 1 if item in long else 3
        return 1 if item.path in long_files else 2

    items.sort(key=place)
