"""Fixtures that several test files share, and how tests are shared among processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if sys.dont_write_bytecode:
    # Where Python is told to leave no bytecode beside sources, every process of the tests would
    # compile torch and transformers anew, which takes as long again as importing them.
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

from tests.helpers.forking import clean_up
from tests.helpers.sharing import Sharing, long_ones_first

if TYPE_CHECKING:  # seconds of imports, which the process that only hands out tests can do without
    from tests.helpers.tiny_run import TinyFiles


def pytest_configure() -> None:
    """Before the libraries are imported, which read this."""
    # Tiny models gain nothing by threads, which wait for each other on a busy machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # No test needs the hub; without a network a look-up tries again for half a minute.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_unconfigure(config) -> None:
    if not hasattr(config, "workerinput"):
        clean_up()


def pytest_xdist_make_scheduler(config, log) -> Sharing:
    config.option.loadscopereorder = False  # it would put the files with most tests first
    return Sharing(config, log)


def pytest_collection_modifyitems(config, items) -> None:
    if hasattr(config, "workerinput"):  # in a process of `pytest -n`
        long_ones_first(items)


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory) -> TinyFiles:
    """Tiny models, SAEs and a task on disk; tests that change a file work on a copy."""
    from tests.helpers.tiny_run import make_files

    return make_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch) -> None:
    """Thousands of small files are written here, none of which has to outlive the machine."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(autouse=True)
def no_job_of_ours(monkeypatch) -> None:
    """What stands for a job of our launcher says so to its whole process."""
    monkeypatch.delenv("CRL_EXP_SLURM_JOB", raising=False)


@pytest.fixture
def quick_figures(monkeypatch) -> None:
    """Figures of few pixels, and in PDF files no fonts."""
    from crl_exp.report.figures import style as figure_style

    monkeypatch.setitem(figure_style.STYLE, "savefig.dpi", 40)
    monkeypatch.setitem(figure_style.STYLE, "pdf.use14corefonts", True)


@pytest.fixture
def quick_reports(quick_figures, monkeypatch) -> None:
    """And not sent to MLflow, which tests/report/test_report_tracking.py tries."""
    from crl_exp.report import command as report

    monkeypatch.setattr(report, "attach", lambda records, folder: None)
