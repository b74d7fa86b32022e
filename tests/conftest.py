"""Fixtures that several test files share."""

from __future__ import annotations

import pytest

from tests.tiny_run import TinyFiles, make_files


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory) -> TinyFiles:
    """Tiny models, SAEs and a task on disk; tests that change a file work on a copy."""
    return make_files(tmp_path_factory.mktemp("tiny"))
