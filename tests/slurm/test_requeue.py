"""Jobs of a real SLURM that are requeued or warned at random moments end as if nothing had been."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import Record
from tests.helpers.disturbed import n_lines
from tests.helpers.tiny_run import ROOT, small
from tests.runs.test_disturbed import METHODS, RARELY, SIZES, moments
from tests.runs.test_resume import outcome

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
PATIENCE_SECONDS = 300.0
SETTLED_SECONDS = 2.0


def wait_for(
    what: str,
    ready: Callable[[], object],
    said: Callable[[], str] = lambda: "",
) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert time.monotonic() < deadline, f"{what} did not come\n{said()}"
        time.sleep(0.02)


class Job:
    """One run as a job of its own. module: what the job runs, with the run's directory."""

    def __init__(self, cluster, home: Path, overrides: list[str], module: Sequence[str]):
        self.cluster, self.home = cluster, home
        home.mkdir()
        self.pending_since: float | None = None
        self.events, self.log = home / "events", home / "log"
        self.run = RunDirectory(small([*overrides, f"output_dir={home / 'out'}"]))
        self.run.freeze()
        os.environ["DISTURBED_EVENTS"] = str(self.events)
        command = [sys.executable, "-m", *module, str(self.run.path)]
        self.id = cluster.run(
            "sbatch", "--parsable", "--requeue", "--open-mode=append", f"--chdir={ROOT}",
            f"--output={self.log}", f"--wrap=srun {shlex.join(command)}",
        ).strip()  # fmt: skip

    @property
    def state(self) -> str:
        return self.run.status().get("state", "")

    def said(self) -> str:
        """What the job printed, and what SLURM knows of it."""
        printed = self.log.read_text() if self.log.exists() else "no log"
        known = self.cluster.run("scontrol", "show", "job", self.id, check=False)
        return f"{printed}\n{self.run.status()}\n{known}"

    def disturb(self, attempt: int, how: str, position: int, delay: float) -> None:
        """Once the attempt has got so far, disturb it."""

        def there() -> bool:
            self.start_soon()
            status = self.run.status()
            running = status.get("state") == "running" and status["attempts"] == attempt
            return running and n_lines(self.events) >= position

        wait_for(f"attempt {attempt} at {position}", there, self.said)
        time.sleep(delay)
        if how == "requeue":
            self.cluster.run("scontrol", "requeue", self.id)
        else:
            self.cluster.run("scancel", f"--signal={how}", self.id)
        wait_for(f"the end of attempt {attempt}", lambda: self.state != "running", self.said)
        assert self.state == "preempted", self.said()

    def start_soon(self) -> None:
        """A requeued job waits two minutes otherwise. Not at once: a start in the very second in
        which SLURM revokes the last one's credential fails."""
        if self.state == "running" or self.cluster.queue().get(self.id) != "PENDING":
            self.pending_since = None
            return
        now = time.monotonic()
        self.pending_since = self.pending_since or now
        if now - self.pending_since > SETTLED_SECONDS:
            self.pending_since = None
            with contextlib.suppress(RuntimeError):  # it has just started by itself
                self.cluster.start_now(self.id)

    def end(self) -> None:

        def over() -> bool:
            self.start_soon()
            return self.state in ("done", "failed")

        wait_for("the end", over, self.said)
        assert self.state == "done", self.said()


@pytest.fixture(autouse=True)
def _environment(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DISTURBED_EVENTS", "")


@pytest.fixture
def zygote(tmp_path_factory) -> Iterator[list[str]]:
    folder = Path(tempfile.mkdtemp(prefix="zygote-"))  # a socket's path may have 107 characters
    path, log = folder / "socket", (folder / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.slurm.zygote", "serve", str(path)], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log,
    )  # fmt: skip
    wait_for("the zygote", path.exists, (folder / "log").read_text)
    yield ["tests.slurm.zygote", "ask", str(path)]
    server.kill()
    server.wait()
    shutil.rmtree(folder)


def disturbed_as_straight(cluster, tiny_files, home: Path, module: list[str], names: list[str]):
    common = [o for o in tiny_files.overrides() if not o.startswith("task")]
    overrides = [*common, *SIZES, *METHODS["crl"], *RARELY]
    straight = Job(cluster, home / "straight", overrides, module)
    straight.end()
    events = straight.events.read_text().splitlines()
    disturbed = Job(cluster, home / "disturbed", overrides, module)
    for number, one in enumerate(moments(len(events), names, seed=1)):
        disturbed.disturb(number + 1, one["name"], one["position"], one["delay"])
        assert disturbed.run.status()["slurm_job_id"] == disturbed.id
    disturbed.end()
    assert Record(disturbed.run.path).status["attempts"] == len(names) + 1, disturbed.said()
    happened = disturbed.events.read_text().splitlines()
    # How the SAEs fit is measured at one go, and anew where that was cut off.
    done, expected = ([e for e in of if '"Collector"' not in e] for of in (happened, events))
    assert done == expected, "a step is missing, out of order, or done again"
    assert outcome(disturbed.run.path) == outcome(straight.run.path)


@pytest.mark.timeout(1800)
def test_requeued_and_warned_twenty_times(cluster, zygote, tiny_files, tmp_path):
    disturbed_as_straight(cluster, tiny_files, tmp_path, zygote, ["USR2", "requeue"] * 10)


@pytest.mark.timeout(1800)
def test_requeued_and_warned_with_processes_of_the_jobs_own(cluster, tiny_files, tmp_path):
    module = ["tests.slurm.disturbed_job"]
    disturbed_as_straight(cluster, tiny_files, tmp_path, module, ["USR2", "requeue"])


@pytest.mark.timeout(600)
def test_scancel_is_a_cancellation(cluster, zygote, tiny_files, tmp_path):
    """SIGTERM tells it and a preemption alike; SLURM knows which it was."""
    common = [o for o in tiny_files.overrides() if not o.startswith("task")]
    job = Job(cluster, tmp_path / "job", [*common, *SIZES, *METHODS["crl"], *RARELY], zygote)
    wait_for("its beginning", lambda: n_lines(job.events) > 10, job.said)
    cluster.run("scancel", job.id)
    wait_for("its end", lambda: job.state not in ("", "running"), job.said)
    assert (job.state, job.run.status()["signal"]) == ("cancelled", "SIGTERM"), job.said()
    wait_for("an empty queue", lambda: job.id not in cluster.queue(), job.said)
    time.sleep(2.0)
    assert job.id not in cluster.queue(), "it came back"
    state = job.run.load_checkpoint()
    assert state is not None and state["step"] >= 1, "it was saved"
