"""Fixtures that several test files share."""

from __future__ import annotations

import os

import pytest
import torch

from tests.tiny_run import TinyFiles, make_files


def pytest_configure() -> None:
    """Tiny models gain nothing by threads, which wait for each other on a busy machine."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory) -> TinyFiles:
    """Tiny models, SAEs and a task on disk; tests that change a file work on a copy."""
    return make_files(tmp_path_factory.mktemp("tiny"))
