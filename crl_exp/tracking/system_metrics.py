"""Load of the machine while a run is going on: `system.jsonl` in its directory.

MLflow has a monitor of its own, which sends what it reads at once and ends when a server doesn't
answer. This one writes to the run directory; the names are MLflow's, so that its page of system
metrics shows them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import psutil

from crl_exp.config.files import finite

log = logging.getLogger(__name__)
GPU_COLUMNS = ("utilization.gpu", "memory.used", "memory.total", "power.draw")
MEGABYTE = 1e6


class SystemMonitor:
    """Appends a line to `path` every `seconds` seconds, in a thread of its own."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.seconds = path, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="system metrics", daemon=True)
        self._process = psutil.Process()
        self._network = psutil.net_io_counters()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _loop(self) -> None:
        self.read()  # percentages are of the time since this thread's last reading
        step = self._lines_written()
        while not self._stop.wait(self.seconds):
            line = {"step": step, "time": time.time(), "metrics": finite(self.read())}
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, allow_nan=False) + "\n")
            except OSError as error:
                log.warning("no more system metrics: %s", error)
                return
            step += 1

    def _lines_written(self) -> int:
        """Of earlier attempts; a line that a kill cut short is taken off."""
        if not self.path.exists():
            return 0
        whole = self.path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        os.truncate(self.path, len(kept))
        return kept.count(b"\n")

    def read(self) -> dict[str, float]:
        """Percent, megabytes and watts, by MLflow's names. Network: since the start."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self.path.parent))
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "process_cpu_percentage": self._process.cpu_percent(),
            "process_memory_usage_megabytes": self._process.memory_info().rss / MEGABYTE,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / MEGABYTE,
            "disk_available_megabytes": disk.free / MEGABYTE,
        }
        network = psutil.net_io_counters()
        if network is not None and self._network is not None:
            received = network.bytes_recv - self._network.bytes_recv
            sent = network.bytes_sent - self._network.bytes_sent
            found["network_receive_megabytes"] = received / MEGABYTE
            found["network_transmit_megabytes"] = sent / MEGABYTE
        found |= gpu_metrics(nvidia_smi())
        return {name: round(value, 2) for name, value in found.items()}


def nvidia_smi() -> str:
    """What the driver's own program says of this job's GPUs; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return ""
    which = [] if visible is None else ["-i", visible]
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(GPU_COLUMNS)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(
            [*command, *which], capture_output=True, encoding="utf-8", errors="replace", timeout=10
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""


def gpu_metrics(table: str) -> dict[str, float]:
    """One line a GPU of `GPU_COLUMNS`, MiB and watts. What a GPU doesn't tell is left out."""
    found: dict[str, float] = {}
    for i, line in enumerate(table.splitlines()):
        values = [_number(cell) for cell in line.split(",")]
        if len(values) != len(GPU_COLUMNS):
            continue
        busy, used, total, watts = values
        known = {
            "utilization_percentage": busy,
            "memory_usage_megabytes": None if used is None else used * 1.048576,
            "memory_usage_percentage": 100 * used / total if used is not None and total else None,
            "power_usage_watts": watts,
        }
        found |= {f"gpu_{i}_{name}": value for name, value in known.items() if value is not None}
    return found


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # "[N/A]"
        return None
