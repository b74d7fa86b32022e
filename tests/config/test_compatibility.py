"""Options that came later: keys of finished runs stay, and configs frozen earlier run on."""

from __future__ import annotations

import importlib

import pytest
from omegaconf import OmegaConf

from crl_exp.config import compatibility
from crl_exp.config.compatibility import (
    MOVED,
    Added,
    Mended,
    fill_missing,
    first_name,
    hashed,
    is_filled,
    todays_name,
)
from crl_exp.config.keys import content_key, plain_of, run_key
from tests.helpers.tiny_run import quickly_composed

OLD = {"seed": 0, "method": {"_target_": "crl_exp.methods.CRL", "stage2": True}}


@pytest.fixture(autouse=True)
def one_option(monkeypatch):
    monkeypatch.setattr(compatibility, "ADDED", (Added("method", "CRL", "null_action", False),))
    monkeypatch.setattr(compatibility, "MENDED", ())


ADDED, MENDED = compatibility.ADDED, compatibility.MENDED


@pytest.fixture
def as_it_is(monkeypatch):
    """All of them, and not the one made up for the other tests."""
    monkeypatch.setattr(compatibility, "ADDED", ADDED)
    monkeypatch.setattr(compatibility, "MENDED", MENDED)


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
    other = {
        "seed": 0,
        "method": {"_target_": "crl_exp.methods.NotCRL", "null_action": False},
    }
    assert hashed(other) == other


def test_a_missing_option_is_filled_and_a_given_one_kept():
    config = OmegaConf.create(OLD)
    fill_missing(config)
    assert config.method.null_action is False
    given = with_option(True)
    fill_missing(given)  # type: ignore[arg-type]
    assert given.method.null_action is True


def test_a_config_is_filled_where_filling_changes_nothing(as_it_is):
    """Each option taken away by itself, and each class under its first name."""
    config = quickly_composed(["method=crl"])
    OmegaConf.set_struct(config, False)
    fill_missing(config)
    whole = plain_of(config)
    assert is_filled(whole)
    n_away = 0
    for added in ADDED:
        section = whole.get(added.section)
        if isinstance(section, dict) and added.key in section:
            less = {key: value for key, value in section.items() if key != added.key}
            again = OmegaConf.create({**whole, added.section: less})
            fill_missing(again)
            changes = plain_of(again)[added.section] != less
            assert is_filled({**whole, added.section: less}) is not changes, added
            n_away += changes
    assert n_away > 20
    old = first_name(whole["method"]["_target_"])
    assert old != whole["method"]["_target_"]
    assert not is_filled({**whole, "method": {**whole["method"], "_target_": old}})
    assert not is_filled({key: of for key, of in whole.items() if key != "experiment"})


def test_a_mended_fault_gives_the_runs_concerned_another_key(monkeypatch):
    old = run_key(OmegaConf.create(OLD))
    mend = Mended("trained right", lambda plain: plain["method"]["stage2"])
    monkeypatch.setattr(compatibility, "MENDED", (mend,))
    assert run_key(OmegaConf.create(OLD)) != old
    off = {"seed": 0, "method": {**OLD["method"], "stage2": False}}
    assert hashed(off) == off


# --- the options and mended faults that there are ---


def key(task: dict, **warmup) -> str:
    return run_key(OmegaConf.create({"seed": 0, "task": task, "warmup": warmup}))


SENTIMENT = {"_target_": "crl_exp.tasks.sentiment.Sentiment"}
SIMPLEQA = {"_target_": "crl_exp.tasks.open_questions.SimpleQA", "scorer": "token_f1"}


@pytest.mark.parametrize(
    ("task", "alike"),
    [
        (SENTIMENT, True),
        (SIMPLEQA, False),
        ({**SIMPLEQA, "scorer": "cross_encoder"}, True),
        ({"_target_": "crl_exp.tasks.web_questions.WebQuestions"}, False),
    ],
)
def test_where_rewards_are_0_or_1_it_is_the_same_which_count_as_rewarded(task, alike, as_it_is):
    old = key(task)
    assert key(task, rewarded="half") == old
    assert (key(task, rewarded="positive") == old) == alike


def test_rewards_said_to_be_0_or_1_are_so(as_it_is):
    """Of every task in `conf/`: none is scored by shared words."""
    from tests.helpers.tiny_run import CONF, quickly_composed

    names = sorted(path.stem for path in (CONF / "task").glob("*.yaml"))
    scorers: dict[str, bool] = {}
    for name in names:
        task = OmegaConf.to_container(quickly_composed([f"task={name}"]).task)
        scorers[name] = compatibility.all_or_nothing({"task": task})
        if "scorer" in task:  # type: ignore[operator]
            shared = {"task": {**task, "scorer": "token_f1"}}  # type: ignore[dict-item]
            assert not compatibility.all_or_nothing(shared)
    assert {"sentiment", "mmlu", "gsm8k", "xstest"} <= {n for n, known in scorers.items() if known}


@pytest.mark.parametrize(
    ("overrides", "mended"),
    [
        ([], []),
        (["policy.policy_depth=0"], []),
        (["method.stage2=false"], []),
        (["method=corrsteer_s"], []),
        (["method=random"], ["directions and features drawn by layer"]),
        (["method=random_direction"], ["directions and features drawn by layer"]),
        (["method=none", "warmup.score=fisher"], []),
        (["method=corrsteer_s", "warmup.score=fisher"],
         ["scores compared across layers as they are"]),
        (["method=corrsteer_s", "warmup.negative=steer"],
         ["steered against by means over failures"]),
        (["method=corrsteer_s", "warmup.negative=steer", "coefficient=relative"], []),
        (["algorithm.flatten_tokens=false"], ["tokens of an answer counted in the whole rollout"]),
        (["algorithm.flatten_tokens=false", "algorithm.minibatches=1"], []),
        (["activation=gumbel_topk_author"], ["evaluations sample by item"]),
        (["activation=gumbel_topk_author", "method.features=fixed"], []),
        (["method=corrsteer_a", "warmup.score=fisher"], []),
        (["method=raw_residual", "method.norm_match=false", "warmup.score=fisher",
          "warmup.negative=steer"], []),
        (["method=probe", "warmup.negative=steer"], []),
        (["method=attribution", "warmup.negative=steer", "coefficient=mean_positive"],
         ["attribution takes away means over failures"]),
        (["task.shuffle_labels=true"], ["shuffled labels drawn by the run's seed"]),
        (["task=mmlu"], []), (["task=mmlu_pro"], []), (["task=gsm8k"], []),
        (["task=mmlu", "task.n_validation=2000"],
         ["validation filled up before train is drawn"]),
    ],
)  # fmt: skip
def test_keys_of_configs_that_no_fault_concerns_stay(overrides, mended, as_it_is):
    from tests.helpers.tiny_run import quickly_composed

    plain = OmegaConf.to_container(quickly_composed(overrides), resolve=True)
    now = hashed(plain)  # type: ignore[arg-type]
    assert now.pop("mended", []) == mended
    assert "rewarded" not in now["warmup"] and "dictionary" not in now["sae"]


@pytest.mark.parametrize(
    ("overrides", "hashed_in"),
    [([], False), (["policy.first_weights=by_layer"], True),
     (["policy=linear", "policy.first_weights=by_layer"], False),
     (["method.stage2=false", "policy.first_weights=by_layer"], False),
     (["policy=linear", "policy.first_weights=by_layer", "activation=sparse_attention_author"],
      True)],
)  # fmt: skip
def test_how_first_weights_are_drawn_matters_where_some_are(overrides, hashed_in, as_it_is):
    from tests.helpers.tiny_run import quickly_composed

    plain = OmegaConf.to_container(quickly_composed(overrides), resolve=True)
    assert ("first_weights" in hashed(plain)["policy"]) == hashed_in  # type: ignore[arg-type]


def test_a_run_of_before_is_known_by_its_key(as_it_is):
    """Whatever it lacks of the faults mended since."""
    steered = {
        "method": {"_target_": "crl_exp.methods.CorrSteerS"},
        "warmup": {"score": "fisher", "negative": "steer"},
        "coefficient": {
            "_target_": "crl_exp.coefficients.FromWarmup",
            "statistic": "mean_active",
        },
    }
    first, second = (whole := hashed(steered))["mended"]
    assert whole["mended"] == sorted(whole["mended"])
    for known, missing in (([], [first, second]), ([first], [second]), ([first, second], [])):
        of_then = {**steered, "mended": known} if known else steered
        got = compatibility.mended_since(steered, content_key(of_then), content_key)
        assert got == missing
    assert compatibility.mended_since(steered, "of another config", content_key) == []


def test_a_class_that_moved_keeps_its_name_in_keys_and_configs_of_before_run():
    """The first name is hashed; a config that has it means the class of today."""
    for first, now in (
        ("crl_exp.methods.CRL", "crl_exp.steering.methods.crl.CRL"),
        ("crl_exp.methods.CorrSteerS", "crl_exp.steering.methods.corrsteer.CorrSteerS"),
        ("crl_exp.tasks.tiny.Sums", "crl_exp.tasks.sums.Sums"),
        ("crl_exp.tasks.sentiment.Sentiment", "crl_exp.tasks.sentiment.Sentiment"),
    ):
        assert (first_name(now), todays_name(first)) == (first, now)
        assert (first_name(first), todays_name(now)) == (first, now)
    among = {"layers": {"_target_": "crl_exp.layers.BestOnValidation", "among": [1]}}
    moved = {"layers": {"_target_": "crl_exp.experiments.layers.BestOnValidation", "among": [1]}}
    assert hashed(moved) == hashed(among) == among
    config = OmegaConf.create(among)
    fill_missing(config)
    assert config.layers._target_ == moved["layers"]["_target_"]


def test_every_class_that_a_config_names_is_there():
    for target in MOVED.values():
        module, _, name = target.rpartition(".")
        if name.islower():
            importlib.import_module(f"crl_exp.{target}")
        else:
            assert hasattr(importlib.import_module(f"crl_exp.{module}"), name)
