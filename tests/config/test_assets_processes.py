"""The asset fetcher as processes: two at once, one killed, the command line, the real cache."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from crl_exp.config.machine.asset_sources import ASSETS, SMOLLM2_WEIGHTS, Archive
from crl_exp.config.machine.assets import asset_path, cache_dir, hash_faults, read_manifest
from tests.helpers import asset_fakes
from tests.helpers.asset_fakes import TEXT, files_below, text_asset

# Fixtures, by their names here.
pip_index = asset_fakes.pip_index
cache_root = asset_fakes.cache_root

WORKER = """
import json, pathlib, sys, time
from rich.console import Console
from crl_exp.config.machine.asset_sources import Archive, Asset
from crl_exp.launcher.assets.command import fetch

root, log, seconds = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def convert(source, target):
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    with open(log, "a") as stream:
        stream.write("converted\\n")
    time.sleep(seconds)

archive = Archive(**json.loads(sys.argv[4]))
fetch([Asset("data/pkga", archive, ("pkga/text.txt",), convert=convert)], root, Console())
"""


def start_worker(
    cache_root: Path, log: Path, seconds: float, archive: Archive
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(cache_root), str(log), str(seconds)]
    command.append(json.dumps(asdict(archive)))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_do_the_work_once(pip_index: Path, cache_root: Path, tmp_path: Path) -> None:
    archive, log = text_asset(pip_index).archive, tmp_path / "log"
    workers = [start_worker(cache_root, log, 0.5, archive) for _ in range(2)]
    said = [worker.communicate(timeout=60)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert log.read_text() == "converted\n"
    assert (asset_path("data/pkga") / "text.txt").read_bytes() == TEXT


def test_a_killed_process_leaves_nothing_half_done(
    pip_index: Path, cache_root: Path, tmp_path: Path
) -> None:
    archive, log = text_asset(pip_index).archive, tmp_path / "log"
    worker = start_worker(cache_root, log, 600, archive)
    while not log.exists() and worker.poll() is None:
        time.sleep(0.02)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert not (cache_root / "data").exists() and not read_manifest(cache_root)
    (pip_index / archive.filename).unlink()  # the download was finished and isn't repeated
    again = start_worker(cache_root, log, 0, archive)
    assert again.wait(60) == 0
    assert files_below(cache_root / "data") == {"pkga/text.txt"}
    assert not (cache_root / ".partial").exists()


@pytest.mark.parametrize("arguments", [["--check"], ["data/nonsense"]])
def test_the_command_prints_no_traceback(cache_root: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "crl_exp", "assets", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("crl_exp assets: ") and "Traceback" not in done.stderr


@pytest.mark.assets
@pytest.mark.slow
def test_the_real_assets_are_as_they_were_made() -> None:
    from transformers import LlamaForCausalLM

    from crl_exp.launcher.assets.convert_gguf import weights_digest

    assert hash_faults(cache_dir(), [asset.name for asset in ASSETS]) == []
    model = LlamaForCausalLM.from_pretrained(asset_path(ASSETS[0].name))
    assert weights_digest(model.state_dict()) == SMOLLM2_WEIGHTS
