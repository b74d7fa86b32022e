"""A disk that is full or read-only, and death while a checkpoint is being written."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crl_exp.config.files import DiskError
from crl_exp.runs.checkpoints import Checkpoint
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import Record
from tests.helpers.tiny_run import ROOT, run_small, small
from tests.runs.test_resume import outcome

# A checkpoint of some 3 MB, so that a second one doesn't fit.
LARGE = ["policy=mlp", "policy.policy_depth=1", "policy.hidden=1024", "checkpoint.updates=1",
         "algorithm.n_updates=4", "task.n_train=24"]  # fmt: skip
FULL_MIB, ENOUGH_MIB = 5, 60


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path):
        self.path = path

    def mount(self, options: str, *more: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, *more, "none", str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"NO TEST OF A FULL DISK WAS RUN, mount: {done.stderr.strip()}")

    def again(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("NO TEST OF A FULL DISK WAS RUN: only root may mount one")
    made = Disk(tmp_path / "disk")
    made.path.mkdir()
    made.mount(f"size={FULL_MIB}m")
    yield made
    subprocess.run(["umount", "-l", str(made.path)], check=True)


def fails(overrides: list[str], words: str) -> str:
    with pytest.raises(DiskError, match=words) as caught:
        run_small(overrides)
    return str(caught.value)


def test_full_then_read_only_then_mended(disk, tiny_files, tmp_path):
    common = [*tiny_files.overrides(), *LARGE]
    _, expected = run_small([*common, f"output_dir={tmp_path / 'enough'}"])
    overrides = [*common, f"output_dir={disk.path / 'out'}"]
    folder = RunDirectory(small(overrides)).path

    said = fails(overrides, "the disk is full")
    assert "goes on from its last checkpoint" in said and "checkpoint.pt" in said
    record = Record(folder)
    assert record.state == "failed" and "the disk is full" in record.status["error"]
    assert not list(folder.glob(".*.partial")), "what could not be written is removed"
    first = RunDirectory(small(overrides)).checkpoint().load()
    assert first is not None and first["step"] == 1, "the last good one is whole"

    disk.again("ro")
    before = (folder / "status.json").read_bytes()
    with pytest.raises(ValueError, match=r"can't write to.*Read-only.*set output_dir="):
        run_small(overrides)
    assert (folder / "status.json").read_bytes() == before

    disk.again(f"rw,size={ENOUGH_MIB}m")
    run_small(overrides)
    assert outcome(folder) == outcome(expected)
    assert Record(folder).state == "done" and Record(folder).status["attempts"] == 2


def _fail_on_a_full_disk(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 4096)
    raise RuntimeError("first")


def test_full_to_the_last_byte_the_error_is_still_the_first_one(disk, tiny_files, caplog):
    """Not even a status can be written: the run's own error is told, its state is lost."""
    overrides = [*tiny_files.overrides(), f"output_dir={disk.path / 'out'}"]
    run = RunDirectory(small(overrides))
    run.path.mkdir(parents=True)
    run.set_status("queued")
    with pytest.raises(RuntimeError, match="first"), run.opened():
        _fail_on_a_full_disk(disk.path / "filler")
    assert "its status.json can't say so" in caplog.text
    assert Record(run.path).state == "lost", "it says running, and nobody has it"


WRITER = """
import os, sys
from pathlib import Path
import torch
from crl_exp.runs.checkpoints import Checkpoint
checkpoint = Checkpoint(Path(sys.argv[1]), "key", "")
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child:
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)
        continue
    state = checkpoint.load()
    step = 0 if state is None else state["step"]
    while True:
        step += 1
        checkpoint.save({"step": step, "x": torch.full((1_000_000,), float(step))})
        Path(sys.argv[2]).write_text(str(step))
"""


def steps_said(said: Path) -> int:
    return int((said.read_text() if said.exists() else "") or 0)


def one_more_saved(path: Path, said: Path, last: int) -> bool:
    return steps_said(said) > last


def being_written(path: Path, said: Path, last: int) -> bool:
    return bool(list(path.parent.glob(".checkpoint.*.partial")))


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.0005)  # short: a checkpoint is written in milliseconds


@pytest.mark.slow
def test_killed_thirty_times_while_a_checkpoint_is_written(tmp_path):
    """A state is always there, whole, and never older than the last one that was said saved."""
    path, said = tmp_path / "checkpoint.pt", tmp_path / "said"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(said)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert writer.stdin and writer.stdout and writer.stdout.readline() == "ready\n"
    draw, mid_write, last = random.Random(0), 0, 0
    for number in range(30):
        writer.stdin.write("go\n")
        writer.stdin.flush()
        child = int(writer.stdout.readline())
        moment, most = (being_written, 0.002) if number % 2 else (one_more_saved, 0.02)
        wait_for(lambda moment=moment, last=last: moment(path, said, last))
        time.sleep(draw.random() * most)
        os.kill(child, 9)
        assert writer.stdout.readline() == "ended\n"
        mid_write += being_written(path, said, last)
        state = Checkpoint(path, "key", "").load()
        step = 0 if state is None else state["step"]
        assert step >= max(last, steps_said(said))
        assert state is None or bool((state["x"] == step).all())
        last = step
    writer.stdin.close()
    writer.wait(timeout=60)
    assert mid_write >= 5 and last >= 15, (mid_write, last)
