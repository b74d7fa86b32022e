"""`python -m crl_exp doctor` beside a real SLURM."""

from __future__ import annotations

import pytest

from crl_exp.launcher.doctor.cluster import slurm as check
from crl_exp.launcher.doctor.command import composed

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_the_cluster_is_told_as_it_is(cluster, tmp_path):
    def found(*overrides: str) -> list[tuple[str, str]]:
        more = (f"output_dir={tmp_path}", "hydra/launcher=slurm", *overrides)
        return [(one.state, one.told) for one in check(composed(["+debug=tiny", *more]))]

    (first, second) = found("hydra.launcher.gpus=1")
    assert first[0] == "ok" and first[1].endswith("partitions debug*")
    assert second[0] == "ok" and second[1].startswith("partition debug: limit infinite, gpu")
    states = [state for state, _ in found("hydra.launcher.partition=debgu")]
    assert states == ["ok", "failed"]
