"""The cluster, started when a test first asks for it; without SLURM the tests are skipped."""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Iterator

import pytest

from tests.helpers import forking
from tests.slurm.cluster import Cluster, missing_programs, running_cluster

HOW = "on Debian, as root: apt-get install munge slurmctld slurmd slurm-client"


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    missing = missing_programs()
    why = f"{', '.join(missing)} missing; {HOW}" if missing else ""
    if not missing and os.geteuid() != 0:
        why = "only root can start the test cluster"
    if why:
        warnings.warn(f"NO TEST ON SLURM WAS RUN: {why}", stacklevel=1)
        pytest.skip(f"no SLURM: {why}")
    # The jobs' forks are of a process that is in no job, which would end it.
    subprocess.run([forking.python(), "-c", ""], check=True)
    with running_cluster(cpus=2) as started:
        yield started


@pytest.fixture
def cluster(slurm, monkeypatch) -> Iterator[Cluster]:
    """The cluster, for this test's own commands; its jobs are cancelled afterwards."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm.environment[name])
    yield slurm
    slurm.run("scancel", "--user=root")


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory) -> Iterator[None]:
    """Tiny models and SAEs of their own, which a test may damage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRL_EXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
