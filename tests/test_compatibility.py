"""Options that came later: keys of finished runs stay, and configs frozen earlier run on."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from crl_exp import compatibility
from crl_exp.compatibility import Added, Mended, fill_missing, hashed
from crl_exp.run_keys import run_key
from tests.tiny_run import quickly_composed

OLD = {"seed": 0, "method": {"_target_": "crl_exp.methods.CRL", "stage2": True}}


@pytest.fixture(autouse=True)
def one_option(monkeypatch):
    monkeypatch.setattr(compatibility, "ADDED", (Added("method", "CRL", "null_action", False),))
    monkeypatch.setattr(compatibility, "MENDED", ())


@pytest.fixture
def as_it_is(monkeypatch):
    """All of them, and not the one made up for the other tests."""
    monkeypatch.undo()


def test_a_table_is_not_hashed_but_what_was_found_in_it_is(as_it_is):
    """So another wording may be added, and a run of before there were any keeps its key."""
    old = quickly_composed(["task=sentiment"])
    OmegaConf.set_struct(old, False)
    key = run_key(old)
    more = quickly_composed(["task=sentiment", "+task.wordings.mine='My {text}'"])
    assert run_key(more) == key
    mine = quickly_composed(["task=sentiment", "+task.wordings.mine='My {text}'",
                             "task.wording=mine"])  # fmt: skip
    named = quickly_composed(["task=sentiment", "task.wording=options_named"])
    assert len({key, run_key(mine), run_key(named)}) == 3
    for name in ("wording", "wordings"):
        del old.task[name]
    old.task.question = more.task.question
    assert run_key(old) == key
    fill_missing(old)
    assert old.task.wording == "plain" and run_key(old) == key


def with_option(value):
    return OmegaConf.merge(OLD, {"method": {"null_action": value}})


def test_an_option_that_means_what_was_is_not_hashed():
    old = run_key(OmegaConf.create(OLD))
    assert run_key(with_option(False)) == old  # type: ignore[arg-type]
    assert run_key(with_option(True)) != old  # type: ignore[arg-type]
    assert run_key(with_option("???")) == old, "not set: as if it weren't there"  # type: ignore[arg-type]


def test_an_option_of_another_class_is_hashed():
    other = {"seed": 0, "method": {"_target_": "crl_exp.methods.NotCRL", "null_action": False}}
    assert hashed(other) == other


def test_a_missing_option_is_filled_and_a_given_one_kept():
    config = OmegaConf.create(OLD)
    fill_missing(config)
    assert config.method.null_action is False
    given = with_option(True)
    fill_missing(given)  # type: ignore[arg-type]
    assert given.method.null_action is True


def test_a_mended_fault_gives_the_runs_concerned_another_key(monkeypatch):
    old = run_key(OmegaConf.create(OLD))
    mend = Mended("trained right", lambda plain: plain["method"]["stage2"])
    monkeypatch.setattr(compatibility, "MENDED", (mend,))
    assert run_key(OmegaConf.create(OLD)) != old
    off = {"seed": 0, "method": {**OLD["method"], "stage2": False}}
    assert hashed(off) == off
