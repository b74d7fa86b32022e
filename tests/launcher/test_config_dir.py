"""YAML files of one's own beside the shipped ones, on the command line (`--config-dir`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crl_exp.config.errors import UserError
from crl_exp.launcher.command_line import people_errors
from crl_exp.launcher.composing import compose
from tests.helpers.tiny_run import ROOT


def launched(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "--config-dir", "own", *words], cwd=folder,
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "CRL_EXP_CACHE": str(folder / "cache")},
    )  # fmt: skip


def own(folder: Path, name: str, n_test: int) -> Path:
    path = folder / "own" / "task" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    shipped = (ROOT / "conf" / "task" / "tiny.yaml").read_text()
    path.write_text(shipped.replace("n_test: 16", f"n_test: {n_test}"))
    return path


@pytest.mark.slow
def test_a_file_of_ones_own_is_taken_and_never_hidden(tmp_path):
    """In an empty folder. One with a shipped file's name would be left aside without a word."""
    own(tmp_path, "mine", n_test=9)
    words = ["+debug=tiny", "task=mine", "method=none"]
    done = launched(tmp_path, *words, "task.n_test=10")
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("outputs/tiny/single/*/result.json")
    assert '"n": 10' in result.read_text()
    path = own(tmp_path, "sentiment", n_test=9)
    for more in ([], ["-m", "seed=0,1"], ["-m", "seed=0,1", "hydra/launcher=local_processes"]):
        done = launched(tmp_path, *more, *words, "sweep_name=again")
        assert done.returncode == 1, done.stdout
        assert f"{path} has the name of a shipped file" in done.stderr, done.stderr
    assert not (tmp_path / "outputs" / "tiny" / "again").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"seed: 1\n# caf\xe9\n", r"line 2, byte 6 of the line: 0xE9 .*like cp1252 .*iconv"),
        (b"seed: [1\nb: 2\n", r"line 2, column 2: expected ',' or ']'"),
        (b"seed: \x07\n", r"character 7 of the file: special characters are not allowed"),
    ],
    ids=["encoding", "YAML", "control"],
)
def test_a_file_that_is_no_yaml_is_named_with_its_line(text, said, tmp_path):
    """From a program as from the command line, without a traceback."""
    path = tmp_path / "preset" / "mine.yaml"
    path.parent.mkdir()
    path.write_bytes(text)
    with pytest.raises(UserError, match=rf"(?s){path}.*{said}"):
        compose(["+preset=mine"], tmp_path)
    with pytest.raises(SystemExit, match=rf"(?s)error: .*{path}.*{said}"), people_errors():
        typed(tmp_path)


def typed(folder: Path) -> None:
    """What Hydra reads of `--config-dir FOLDER +preset=mine`."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose("config", overrides=[f"hydra.searchpath=[file://{folder}]", "+preset=mine"])
