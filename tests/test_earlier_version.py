"""Outputs of an earlier version: their keys stay, and they are read, reported and gone on with.

`tests/fixtures/first_version/old` was written by the version that its `code.json` names: two
finished runs and one that was ended after the second of four updates, with its checkpoint.
`configs.json.gz` holds resolved configs of four ready sweeps under the keys that they had then.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from crl_exp import config as configs
from crl_exp import report, status
from crl_exp.compatibility import MENDED, fill_missing
from crl_exp.experiment import run_experiment
from crl_exp.records import Record
from crl_exp.run_keys import frozen_config, run_key

EARLIER = Path(__file__).parent / "fixtures" / "first_version"
CRL, CORRSTEER_S, ENDED_EARLY = "aaa4bbbe16f7", "4b66e1ea384d", "739ac9d8e000"


@pytest.fixture
def sweep(tmp_path) -> Path:
    """A copy of the earlier outputs, which a test may write into."""
    return Path(shutil.copytree(EARLIER / "old", tmp_path / "old"))


def test_configs_keep_their_keys():
    with gzip.open(EARLIER / "configs.json.gz", "rt") as file:
        earlier = json.load(file)
    assert len(earlier) == 91
    for key, plain in earlier.items():
        config = OmegaConf.create(plain)
        fill_missing(config)
        concerned = [mended.name for mended in MENDED if mended.concerns(plain)]
        assert (run_key(config) == key) == (not concerned), (plain["method"], concerned)
        assert run_key(OmegaConf.create(plain)) == run_key(config), "filled or not, the same"


def test_sections_that_were_frozen_can_still_be_built():
    with gzip.open(EARLIER / "configs.json.gz", "rt") as file:
        earlier = json.load(file)
    ran = OmegaConf.load(EARLIER / "old" / CRL / "config.yaml")
    for plain in earlier.values():
        configs.experiment(_whole(ran, plain))


def _whole(ran, plain):
    """With the sections that a key leaves out."""
    return OmegaConf.create({**OmegaConf.to_container(ran), **plain})  # type: ignore[dict-item]


def test_finished_runs_are_finished(sweep):
    for key, method in ((CRL, "crl"), (CORRSTEER_S, "corrsteer_s")):
        record = Record(sweep / key)
        assert record.state == "done" and record.result["method"] == method
        before = (sweep / key / "result.json").read_bytes()
        result = run_experiment(frozen_config(sweep / key), skip_finished=True)
        assert result == json.loads(before)
        assert (sweep / key / "result.json").read_bytes() == before


def test_they_are_reported_and_listed(sweep, quick_reports, capsys):
    report.main([str(sweep)])
    assert "CorrSteer-S" in capsys.readouterr().out
    assert (sweep / "report" / "report.html").exists()
    status.main([str(sweep)])
    listed = capsys.readouterr().out
    assert all(key in listed for key in (CRL, CORRSTEER_S, ENDED_EARLY))


def test_a_run_that_was_ended_goes_on_from_its_checkpoint(sweep):
    path = sweep / ENDED_EARLY
    begun = (path / "journal.jsonl").read_text().splitlines()
    result = run_experiment(frozen_config(path), skip_finished=True)
    assert result["method"] == "crl" and Record(path).state == "done"
    journal = (path / "journal.jsonl").read_text().splitlines()
    assert journal[: len(begun)] == begun, "what was done isn't done again"
    assert [json.loads(line)["step"] for line in journal][-1] == 4
