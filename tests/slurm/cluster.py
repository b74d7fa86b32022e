"""A real SLURM of two nodes with two made-up GPUs each, on this machine, for tests.

Debian's munged, slurmctld and two slurmd, with ports, keys and state in a folder of their own; an
installed SLURM's configuration isn't touched. Root only. Commands find it by `Cluster.environment`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
START_SECONDS = 60.0

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
GresTypes=gpu
ReturnToService=2
KillWait=30
SlurmdTimeout=15
MinJobAge=300
MaxArraySize={max_array_size}
{nodes}
PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE State=UP PreemptMode=REQUEUE
"""


def missing_programs() -> list[str]:
    """Of what the cluster is made of, what isn't installed."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@dataclass
class Cluster:
    """The running cluster. cpus: what each node says that it has, so of jobs at a time."""

    folder: Path
    cpus: int
    max_array_size: int
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """For commands that are to use this cluster."""
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        return {**os.environ, "SLURM_CONF": self._config, "PATH": path}

    def run(self, *command: str, check: bool = True) -> str:
        """What a command of SLURM's prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    def queue(self) -> dict[str, str]:
        """State of every job that isn't over, by its id."""
        lines = self.run("squeue", "--noheader", "-r", "-o", "%i %T").splitlines()
        return {words[0]: words[1] for words in (line.split() for line in lines)}

    def start_now(self, job_id: str) -> None:
        """A requeued job waits two minutes otherwise."""
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def kill_node(self, name: str) -> None:
        """The node dies: its slurmd and every process of its jobs, without a word."""
        (daemon := self.processes.pop(f"slurmd {name}")).kill()
        daemon.wait()
        self._kill_jobs(name)

    def _kill_jobs(self, node: str) -> None:
        for process in _job_processes(self, node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def stop_controller(self) -> None:
        """As where it is restarted: it saves its state, and jobs go on without it."""
        (daemon := self.processes.pop("slurmctld")).terminate()
        daemon.wait(START_SECONDS)

    def start_controller(self, *more: str) -> None:
        """Start slurmctld, the first time or again. more: `-c`: without what was saved."""
        self._spawn("slurmctld", ["slurmctld", "-D", *more, "-f", self._config])
        self._wait("slurmctld", lambda: "is UP" in self.run("scontrol", "ping", check=False))

    def start_node(self, name: str) -> None:
        """Start a node's slurmd, the first time or again."""
        self._spawn(f"slurmd {name}", ["slurmd", "-D", "-N", name, "-f", self._config])
        self._wait(f"node {name}", lambda: self._node_is_up(name))

    @property
    def _config(self) -> str:
        return str(self.folder / "slurm.conf")

    def start(self) -> None:
        """Raises `RuntimeError` with the daemons' logs where they don't come up."""
        self._write_files()
        user = pwd.getpwnam("munge")
        munge = [
            "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
            f"--key-file={self.folder}/munge/key", f"--log-file={self.folder}/munge/log",
            f"--pid-file={self.folder}/munge/pid", f"--seed-file={self.folder}/munge/seed",
        ]  # fmt: skip
        as_munge = [
            "setpriv",
            "--pdeathsig=KILL",
            f"--reuid={user.pw_uid}",
            f"--regid={user.pw_gid}",
            "--clear-groups",
        ]
        self._spawn("munged", [*as_munge, *munge])
        self._wait("munged", lambda: (self.folder / "munge.socket").exists())
        self.start_controller("-c")
        for name in NODES:
            self.start_node(name)

    def _write_files(self) -> None:
        user = pwd.getpwnam("munge")
        (self.folder / "munge").mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for path in (self.folder, self.folder / "munge", key):
            os.chown(path, user.pw_uid, user.pw_gid)
        (self.folder / "state").mkdir()
        ports = free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={self.cpus} Gres=gpu:2 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        config = CONFIG.format(
            host=socket.gethostname(), controller_port=ports[0], folder=self.folder,
            max_array_size=self.max_array_size, nodes="\n".join(nodes), names=",".join(NODES),
        )  # fmt: skip
        Path(self._config).write_text(config)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name.replace(' ', '.')}.out").open("a") as log:
            # They don't outlive this process, however it ends.
            self.processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command],
                env=self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _node_is_up(self, name: str) -> bool:
        said = self.run("scontrol", "show", "node", name, check=False)
        return "State=IDLE" in said or "State=ALLOCATED" in said or "State=MIXED" in said

    def _wait(self, what: str, ready) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                why = f"{', '.join(dead)} ended" if dead else "it doesn't answer"
                raise RuntimeError(f"SLURM for tests: no {what}: {why}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        paths = sorted(path for path in self.folder.iterdir() if path.suffix in (".log", ".out"))
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in paths)

    def stop(self) -> None:
        """End the jobs, then the daemons; nothing of the cluster is left."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired, OSError):
            self.run("scancel", "--user=root")
        for name in NODES:
            self._kill_jobs(name)
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def running_cluster(cpus: int = 2, max_array_size: int = 1001) -> Iterator[Cluster]:
    """A cluster for the block; it needs root and the programs."""
    # Not pytest's tmp_path: a socket's path may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    cluster = Cluster(folder, cpus, max_array_size)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(n: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    held = [socket.socket() for _ in range(n)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def _job_processes(cluster: Cluster, node: str) -> list[psutil.Process]:
    """Every process of this node's jobs: slurmstepd by its log, the others by environment."""
    ours = {"SLURM_CONF": cluster.environment["SLURM_CONF"], "SLURMD_NODENAME": node}
    log = str(cluster.folder / f"slurmd.{node}.log")
    steps: list[psutil.Process] = []
    others: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("slurmstepd"):
                steps += [process] * any(file.path == log for file in process.open_files())
            elif ours.items() <= process.environ().items():
                others.append(process)
    return steps + others


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt), running_cluster() as one:
        print(f"export SLURM_CONF={one.environment['SLURM_CONF']}", flush=True)
        signal.pause()
