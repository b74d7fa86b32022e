"""The cluster that the other tests here use: does it do what a real one does?"""

from __future__ import annotations

import time

import pytest


@pytest.mark.slurm
def test_two_nodes_give_jobs_their_gpus(cluster, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/sh\necho $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES >"
        f" {tmp_path}/$SLURM_ARRAY_TASK_ID.txt\nsleep 2\n"
    )
    cluster.run("sbatch", "--array=0-3", "--gres=gpu:1", "--output=/dev/null", str(script))
    deadline = time.monotonic() + 60
    while cluster.queue() and time.monotonic() < deadline:
        time.sleep(0.2)
    said = sorted((tmp_path / f"{i}.txt").read_text().split()[0] for i in range(4))
    assert said == ["n1", "n1", "n2", "n2"], "two GPUs a node: two jobs on each at a time"
