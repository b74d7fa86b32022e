"""Options that do nothing are told, and the ready sweeps hold none: their points act otherwise."""

from __future__ import annotations

import functools
import json
from itertools import combinations

import pytest
from omegaconf import OmegaConf

from crl_exp.config.compatibility import hashed
from crl_exp.config.errors import UserError
from crl_exp.experiments import config as configs
from crl_exp.experiments.config import Experiment
from crl_exp.launcher.planning.plan import check
from crl_exp.steering.stages.effects import Effect, Setting, cautions, effect, follows_correlation
from tests.config.test_config import SWEEPS, sweep_points
from tests.helpers.launching import launched, over, points_of, tiny, until
from tests.helpers.stage_options import ORDERS
from tests.helpers.tiny_run import quickly_composed, run_small

# Sweeps over the stages of the logits and their order.
ABLATIONS = (
    "activations", "exploration", "fusion_weights", "fusions", "masks", "order", "thresholds",
)  # fmt: skip
FREE = ["task=refusal", "tracking=none"]
# Their models are behind a licence.
GATED = ("architectures", "harmbench_lists", "harmbench_parity")


KNOWN = configs.Known()  # sections that are equal are made once


def experiment(*overrides: str) -> Experiment:
    return configs.experiment(quickly_composed(["tracking=none", *overrides]), KNOWN)


def effect_of(*overrides: str) -> Effect:
    found = effect(Setting.of(experiment(*overrides)))
    assert found is not None
    return found


def without_seeds(name: str) -> list[list[str]]:
    """The points of a ready sweep, those that differ in a seed alone once."""
    seeds = ("seed=", "task.train_seed=")
    points = [[o for o in point if not o.startswith(seeds)] for point in sweep_points(name)]
    return [list(point) for point in dict.fromkeys(tuple(point) for point in points)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATIONS)
def test_the_points_of_an_ablation_act_differently(name) -> None:
    points = without_seeds(name)
    assert len(points) > 5
    found = {" ".join(point): effect_of(*point) for point in points}
    for (one, first), (other, second) in combinations(found.items(), 2):
        assert first != second, f"the same acts:\n{one}\n{other}"


@functools.cache
def built(name: str) -> list[tuple[list[str], Experiment]]:
    """Every point of a ready sweep, composed and built."""
    return [(point, experiment(*point)) for point in without_seeds(name)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_a_ready_sweep_holds_nothing_that_does_nothing(name) -> None:
    points = without_seeds(name)
    assert len(sweep_points(name)) > 1
    for point, exp in built(name):
        compared = ("policy.combine",) if point != other_way(point) in points else ()
        assert exp.sweep_name == name, "a sweep's runs lie under its own name"
        assert cautions(exp, compared=compared) == [], point


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SWEEPS if name not in GATED])
def test_every_point_of_every_sweep_fits_its_model_and_saes(name) -> None:
    known = configs.Known()
    for _, exp in built(name):
        assert bool(configs.validate(exp, known)) == exp.method.uses_layers


def other_way(point: list[str]) -> list[str]:
    """With the other way to combine several features."""
    turned = {"policy.combine=sum": "policy.combine=one_length",
              "policy.combine=one_length": "policy.combine=sum"}  # fmt: skip
    return [turned.get(override, "") or override for override in point]


def test_no_order_more_could_differ() -> None:
    """With the sweep's stages all 24 orders have 18 effects, those that the sweep has."""
    stages = next(p for p in sweep_points("order"))
    common = [o for o in stages if not o.startswith("order=")]
    orders = [f"order=[{','.join(order)}]" for order in ORDERS]
    found: list[Effect] = []
    for order in orders:
        made = effect_of(*common, order)
        if all(made != other for other in found):
            found.append(made)
    assert len(found) == len(sweep_points("order")) == 18


TOLD = [
    (["fusion=attention"], "in answers of one token it is fusion=add fusion.weight=1"),
    (["fusion=position_linear"], "in answers of one token it is fusion=add fusion.weight=0.1"),
    (["fusion=position_linear_author"], "in answers of one token it is fusion=add fusion.weight=1"),
    (["fusion=context_scale_author"], "fusion=add fusion.weight=1"),
    (["mask=generation"], "in answers of one token it is mask=active"),
    (["activation=softmax"], "keeps the order of the logits"),
    (["activation=gumbel_topk"], "with temperature 1 it is activation=identity"),
    (["activation=gumbel_topk", "activation.temperature=.5"], "keeps the order of the logits"),
    (["activation=gumbel_topk", "activation.top=8"], "set activation.top=null"),
    (["order=[noise,fusion,activation,mask]"], "every act is that of order=[fusion,noise"),
    (["order=[fusion,noise,mask,activation]", "activation=jumprelu", "mask=active",
      "noise=gaussian"], "every act is that of order=[fusion,noise"),
    (["noise=gaussian", "noise.std=0"], "as well noise=none"),
    (["noise=gaussian", "method.stage2=false"], "noise: does nothing with method.stage2=false"),
    (["activation=jumprelu_constant", "activation.threshold=-99"], "as well activation=identity"),
    (["decay=exponential"], "does nothing in answers of one token"),
    (["method=corrsteer_a", "decay=exponential"], "does nothing in answers of one token"),
    (["policy.k=4"], "√4 = 2 times as long as one"),
    (["policy.critic=q", "algorithm=grpo"], "policy.critic=q: does nothing"),
    (["method.online_correlation=true", "fusion.weight=0"], "no act depends on the correlations"),
    (["warmup.pooling=mean"], "in answers of one token it is max"),
    (["policy=linear", "policy.first_weights=by_layer"], "as well policy.first_weights=by_seed"),
    (["policy=linear", "policy.critic_depth=1", "algorithm=grpo", "policy.first_weights=by_layer"],
     "policy.first_weights=by_layer: does nothing"),
    (["method.stage2=false", "policy.first_weights=by_layer"], "first_weights=by_layer: does noth"),
    *[([f"method={name}", "sae.dictionary=random"], "adds no feature of the SAE") for name in (
        "none", "prompting", "calibration", "bag_of_words", "probe", "probe_steering", "lora",
        "raw_residual", "random_direction method.multipliers=[1]",
    )],
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), TOLD, ids=lambda x: "".join(x)[:60])
def test_what_does_nothing_is_told(overrides, said) -> None:
    found = cautions(experiment(*" ".join(overrides).split()))
    assert len(found) >= 1 and any(said in line for line in found), found


@pytest.mark.parametrize(
    "overrides",
    [
        [], ["fusion=attention", *FREE], ["fusion=position_linear", *FREE],
        ["mask=generation", *FREE], ["decay=exponential", *FREE], ["warmup.pooling=mean", *FREE],
        ["activation=softmax", "order=[activation,fusion,noise,mask]"],
        ["activation=jumprelu_quantile", "mask=active", "order=[fusion,noise,mask,activation]"],
        ["fusion=multiply", "noise=gaussian", "order=[noise,fusion,activation,mask]"],
        ["activation=sparse_gate"], ["activation=ste_topk"], ["activation=gumbel_topk_author"],
        ["mask=all", "mask.keep=1"], ["mask=all", "policy.k=3", "policy.combine=one_length"],
        ["method=corrsteer_a", "activation=softmax"],
        ["policy.first_weights=by_layer"], ["sae.dictionary=random"],
        ["policy=linear", "policy.critic_depth=1", "policy.first_weights=by_layer"],
        ["method=corrsteer_s", "sae.dictionary=permuted"],
        ["method=raw_residual", "method.norm_match=true", "sae.dictionary=random"],
        ["method=attribution", "sae.dictionary=random"],
        ["method.online_correlation=true"],
    ],
    ids=str,
)  # fmt: skip
def test_what_does_something_is_left_alone(overrides) -> None:
    assert cautions(experiment(*overrides)) == []


@pytest.mark.parametrize(
    "option", ["decay=exponential", "warmup.pooling=mean", "fusion=attention", "mask=generation"]
)
def test_with_options_that_may_be_several_tokens_a_plan_says_nothing_of_one_token(option) -> None:
    """The run knows how many an option has."""
    exp = experiment("task=sentiment", "model.path=openai-community/gpt2", option)
    assert cautions(exp) == [] == cautions(exp, 4)
    assert any("answers of one token" in line for line in cautions(exp, 1))


# --- an untrained policy ---


@pytest.mark.parametrize(
    "stages",
    [["fusion=multiply"], ["fusion=one_or_corr"], ["fusion.weight=0"],
     ["fusion=learnable_mix", "fusion.init=0"], ["activation=sparse_attention_author"]],
    ids=str,
)  # fmt: skip
def test_an_untrained_policy_needs_something_to_choose_by(stages) -> None:
    exp = experiment("method.stage2=false", *stages)
    assert any("Set fusion=add" in fault for fault in exp.method.conflicts(exp))
    for other in ("method.stage2=true", "method.features=fixed"):
        exp = experiment("method.stage2=false", *stages, other)
        assert not any("fusion=add" in fault for fault in exp.method.conflicts(exp))


@pytest.mark.parametrize(
    "stages",
    [[], ["fusion.weight=-1"], ["fusion=learnable_mix"], ["fusion=attention"], ["mask=active"],
     ["fusion=multiply", "fusion.negative=softplus"], ["activation=sparse_attention"],
     ["activation=ste_topk", "activation.top=1"], ["activation=jumprelu"]],
    ids=str,
)  # fmt: skip
def test_an_untrained_policy_follows_the_correlation(stages) -> None:
    assert follows_correlation(Setting.of(experiment(*stages)))


def test_scores_below_a_threshold_are_found_in_the_run(tiny_files, tmp_path) -> None:
    """Only stage 1 can tell that every correlation is below it."""
    common = [*tiny_files.overrides(), f"output_dir={tmp_path}", "method.stage2=false"]
    with pytest.raises(UserError, match=r"layer 1: .* Set fusion=add and activation=identity"):
        run_small([*common, "activation=jumprelu_constant", "activation.threshold=0.85"])


# --- where it is said ---


def test_it_is_in_the_result(tiny_files, tmp_path) -> None:
    common = [*tiny_files.overrides(), f"output_dir={tmp_path}"]
    result, _ = run_small([*common, "activation=softmax", "decay=exponential"])
    assert any("keeps the order of the logits" in text for text in result["warnings"])
    assert any("decay.gamma=0.99" in text for text in result["warnings"])


def test_a_plan_tells_each_thing_once_with_its_points(tmp_path) -> None:
    points = points_of(*tiny(tmp_path, "activation=softmax,identity", "seed=0,1,2,3,4"))
    told = check(points)
    assert len(told) == 2 and "keeps the order" in told[0]
    assert "activation=softmax seed=0" in told[1] and told[1].endswith("and 2 more")


def test_a_caution_is_told_of_its_points_alone(tmp_path) -> None:
    """What it depends on tells points apart, also where the stages are the same."""
    points = points_of(*tiny(tmp_path, "policy.critic=q", "algorithm=grpo,ppo"))
    told = check(points)
    assert len(told) == 2 and "algorithm=grpo" in told[1] and ";" not in told[1]


def test_a_larger_dose_that_is_asked_about_is_not_overlooked(tmp_path) -> None:
    """Where the sweep has the same features at one length too, it is what is compared."""
    both = check(points_of(*tiny(tmp_path, "policy.k=2,3", "policy.combine=one_length,sum")))
    assert both == []
    told = check(points_of(*tiny(tmp_path, "policy.k=1,2,3", "seed=0,1")))
    assert [line.split(":")[0] for line in told[::2]] == ["- policy.k=2", "- policy.k=3"]


def test_noise_by_another_schedule_acts_differently() -> None:
    for noise in ("noise=gaussian", "noise=epsilon_greedy"):
        one, other, third = (
            effect_of(noise, f"noise.schedule={how}") for how in ("constant", "linear", "cosine")
        )
        assert one != other and other != third and one != third


def test_points_that_do_the_same_are_told(tmp_path) -> None:
    """Each of them does something; two of them do the same thing."""
    orders = ["[mask,fusion,noise,activation]", "[mask,noise,fusion,activation]"]
    stages = ["activation=jumprelu_quantile", "mask=active", "noise=gaussian", "seed=0,1"]
    points = points_of(*tiny(tmp_path, *stages, f"order={','.join(orders)}"))
    told = check(points)
    assert len(told) == 4
    for i, seed in enumerate((0, 1)):
        said, where = told[2 * i], told[2 * i + 1]
        assert said.startswith("- the same acts as ") and "mask,fusion,noise" in said
        assert "mask,noise,fusion" in where and f"seed={seed}" in where


@pytest.mark.slow
def test_a_launch_prints_it_beside_the_plan(tmp_path, capsys) -> None:
    launched("local_processes", tiny(tmp_path, "activation=softmax", "seed=0"))
    until(lambda: over(tmp_path / "s"))
    said = capsys.readouterr().out
    assert said.index("1 to start") < said.index("no fault, but worth knowing:")
    assert "keeps the order of the logits" in said


def test_a_frozen_config_means_what_it_did() -> None:
    """Keys of before, as an earlier version froze them."""
    config = quickly_composed(["fusion=one_or_corr", "tracking=none"])
    plain = json.loads(json.dumps(OmegaConf.to_container(config)))
    for key in ("select", "selected"):
        del plain["fusion"][key]
    exp = configs.experiment(OmegaConf.create(plain))
    assert (exp.fusion.select, exp.fusion.selected) == ("quantile", "corr")  # type: ignore[attr-defined]


def test_runs_of_gumbel_topk_that_were_drawn_twice_have_another_key() -> None:
    def mended(*overrides: str) -> list[str]:
        config = quickly_composed(["tracking=none", "activation=gumbel_topk", *overrides])
        plain = OmegaConf.to_container(config, resolve=True)
        return hashed(plain).get("mended", [])  # type: ignore[arg-type]

    assert mended() == ["gumbel_topk records the act's probability"]
    for other in ("activation=identity", "method.stage2=false", "method.features=fixed",
                  "method=corrsteer_a", "activation=gumbel_topk_author"):  # fmt: skip
        assert "gumbel_topk records the act's probability" not in mended(other)


def test_a_plan_tells_a_dictionary_that_does_nothing_of_its_points_alone(tmp_path) -> None:
    """What was found for one point isn't taken for another that differs in just this."""
    said = check(points_of(*tiny(tmp_path, "method=none", "sae.dictionary=sae,random")))
    (at,) = [i for i, line in enumerate(said) if "adds no feature of the SAE" in line]
    assert "sae.dictionary=random" in said[at + 1] and "sae.dictionary=sae" not in said[at + 1]
