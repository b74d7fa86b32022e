"""Frozen configs read section by section are those that OmegaConf reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from crl_exp.config import compatibility, plain_configs
from crl_exp.config.errors import UserError
from crl_exp.config.keys import freeze, read_config
from crl_exp.config.plain_configs import filled_config
from tests.helpers.synthetic import config

OLD = sorted((Path(__file__).parents[1] / "fixtures").glob("*/old/*/config.yaml"))
WRITTEN = {
    "a number and a date": "a: 1e5\nb: 2024-11-29\nc: 010\nd: [yes, 'no', 1_000, .5, -1]\n",
    "a text over lines": 'a: "one\n  two"\nb: |\n  x: 1\n\n  y\nc: >-\n  folded\n  text\n',
    "what looks like a section in a quoted text": "a: 'x\n\n  b: 1\n\n  '\nc: 2\n",
    "a reference": "a: 1\nb: ${a}\nc:\n  d: ${.e}\n  e: 2\n",
    "an anchor": "a: &x {y: 1}\nb: *x\n",
    "keys that are no texts": "a: {1: x, true: y}\n",
    "a flow over lines": "a: {x: 1,\ny: 2}\nb: 3\n",
    "a comment and no value": "# told\na:\nb: ~\n\n# more\nc: 1\n",
    "line breaks of another machine": "a: 1\r\nb:\r\n- 2\r\n",
    "a line separator": "a: 'x\u2028b: 1'\nc: 2\n",
    "one document's start": "---\na: 1\n",
    "a whole flow": "{a: 1, b: [2]}\n",
    "quoted keys": "'a': 1\n\"b c\": 2\n",
    "another class, of before": "activation:\n"
    "  _target_: crl_exp.stages.activation.STETopK\n  k: 2\n"
    "policy:\n  of:\n  - _target_: crl_exp.stages.noise.Gaussian\n",
}


def by_omegaconf(path: Path) -> str:
    read = read_config(path)
    compatibility.fill_missing(read)
    return json.dumps(OmegaConf.to_container(read))


@pytest.mark.parametrize("path", OLD, ids=lambda path: f"{path.parts[-4]}-{path.parent.name}")
def test_configs_of_earlier_versions_are_read_alike(path):
    assert json.dumps(filled_config(path)) == by_omegaconf(path)
    assert plain_configs._quickly(path.read_text()) == filled_config(path)  # not by OmegaConf


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN)
def test_whatever_is_written_is_read_alike(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode())
    assert json.dumps(filled_config(path)) == by_omegaconf(path)


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "a: [1\n", "a: 1\na: 2\n", "- 1\n", "a:\n  b: 1\n  b: 2\n", "\0"]
)
def test_a_damaged_config_is_refused_as_ever(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as ours:
        filled_config(path)
    with pytest.raises(UserError) as theirs:
        read_config(path)
    assert str(ours.value) == str(theirs.value)


def test_what_is_shared_between_configs_is_not_what_a_record_gets(tmp_path):
    path = tmp_path / "config.yaml"
    freeze(config(tmp_path), path)
    first = compatibility.without_tables(filled_config(path))
    first["model"]["name"] = "another"
    assert filled_config(path)["model"]["name"] == "tiny"


def test_a_config_edited_since_is_read_anew(tmp_path):
    path = tmp_path / "config.yaml"
    freeze(config(tmp_path, seed=1), path)
    assert filled_config(path)["seed"] == 1
    path.write_text(path.read_text().replace("seed: 1", "seed: 2"))
    assert filled_config(path)["seed"] == 2
