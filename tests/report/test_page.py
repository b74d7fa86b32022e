"""The report's page: by which command its runs were made."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from crl_exp.report.page import page
from crl_exp.report.parts import compare_parts
from crl_exp.runs.records import find_records
from tests.helpers.synthetic import config, finished_run


def page_of(folder: Path) -> str:
    return page(compare_parts(find_records(folder / "demo")), {"": []}, {"": []})


def test_the_command_that_made_the_sweep_is_shown(tmp_path):
    finished_run(config(tmp_path), 0.1)
    assert "started one by one" in page_of(tmp_path)
    typed = ["+sweep=demo", "method.multipliers=[1, 2]", "task.question=<b>{text}",
             "tracking.uri=https://me:secret@x"]  # fmt: skip
    hydra = ["hydra.mode=MULTIRUN", "hydra/launcher=slurm"]
    asked = {"hydra": {"overrides": {"task": typed, "hydra": hydra}}}
    OmegaConf.save(asked, tmp_path / "demo" / "multirun.yaml")
    assert (
        "<code>python launch.py -m hydra/launcher=slurm +sweep=demo &#x27;method.multipliers=[1, "
        "2]&#x27; &#x27;task.question=&lt;b&gt;{text}&#x27;</code>"
    ) in page_of(tmp_path)
