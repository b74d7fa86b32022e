"""Outputs of earlier versions: their keys stay, and they are read, reported and gone on with.

`tests/fixtures/VERSION/old` was written by the version that its `code.json` names: two finished
runs and one that was ended after the second of four updates, with its checkpoint.
`configs.json.gz` holds resolved configs of ready sweeps under the keys that they had then.
`before_the_house` is of the last state in which all modules lay at one level, so that their classes
had other names.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from omegaconf import DictConfig, OmegaConf

from crl_exp.config.compatibility import MENDED, fill_missing
from crl_exp.config.keys import frozen_config, run_key
from crl_exp.experiments import config as configs
from crl_exp.experiments.run import run_experiment
from crl_exp.launcher.commands import status
from crl_exp.report import command as report
from crl_exp.runs.records import Record

FIXTURES = Path(__file__).parents[1] / "fixtures"


class Version(NamedTuple):
    """n_configs: in `configs.json.gz`. The others are keys."""

    name: str
    crl: str
    corrsteer_s: str
    ended_early: str
    n_configs: int

    def configs(self) -> dict[str, dict[str, Any]]:
        with gzip.open(FIXTURES / self.name / "configs.json.gz", "rt") as file:
            return json.load(file)


VERSIONS = (
    Version("first_version", "aaa4bbbe16f7", "4b66e1ea384d", "739ac9d8e000", 91),
    Version("before_the_house", "98c01d6273fe", "a4c7f1fee042", "aaa4bbbe16f7", 92),
)


@pytest.fixture(params=VERSIONS, ids=[version.name for version in VERSIONS])
def earlier(request) -> Version:
    return request.param


@pytest.fixture
def sweep(tmp_path, earlier) -> Path:
    """A copy of the earlier outputs, which a test may write into."""
    return Path(shutil.copytree(FIXTURES / earlier.name / "old", tmp_path / "old"))


def test_configs_keep_their_keys(earlier):
    found = earlier.configs()
    assert len(found) == earlier.n_configs
    for key, plain in found.items():
        config = DictConfig(plain)
        fill_missing(config)
        concerned = [mended.name for mended in MENDED if mended.concerns(plain)]
        same = not concerned or earlier.name != "first_version"  # mended since that one
        assert (run_key(config) == key) == same, (plain["method"], concerned)
        assert run_key(DictConfig(plain)) == run_key(config), "filled or not, the same"


@pytest.mark.slow
def test_sections_that_were_frozen_can_still_be_built(earlier):
    ran = OmegaConf.load(FIXTURES / earlier.name / "old" / earlier.crl / "config.yaml")
    left_out_of_keys = OmegaConf.to_container(ran)
    known = configs.Known()
    for plain in earlier.configs().values():
        configs.experiment(OmegaConf.create({**left_out_of_keys, **plain}), known)  # type: ignore[dict-item]


def test_finished_runs_are_finished(sweep, earlier):
    for key, method in ((earlier.crl, "crl"), (earlier.corrsteer_s, "corrsteer_s")):
        record = Record(sweep / key)
        assert record.state == "done" and record.result is not None
        assert record.result["method"] == method
        before = (sweep / key / "result.json").read_bytes()
        result = run_experiment(frozen_config(sweep / key), skip_finished=True)
        assert result == json.loads(before)
        assert (sweep / key / "result.json").read_bytes() == before


def test_they_are_reported_and_listed(sweep, earlier, quick_reports, capsys):
    report.main([str(sweep)])
    assert "CorrSteer-S" in capsys.readouterr().out
    assert (sweep / "report" / "report.html").exists()
    status.main([str(sweep)])
    listed = capsys.readouterr().out
    assert all(key in listed for key in (earlier.crl, earlier.corrsteer_s, earlier.ended_early))


def test_a_run_that_was_ended_goes_on_from_its_checkpoint(sweep, earlier):
    path = sweep / earlier.ended_early
    begun = (path / "journal.jsonl").read_text().splitlines()
    result = run_experiment(frozen_config(path), skip_finished=True)
    assert result is not None
    assert result["method"] == "crl" and Record(path).state == "done"
    journal = (path / "journal.jsonl").read_text().splitlines()
    assert journal[: len(begun)] == begun, "what was done isn't done again"
    assert [json.loads(line)["step"] for line in journal][-1] == 4
