"""What a config of an earlier version means now: options added since, and what was mended.

The rule, for every version from now on: an option that equals what meant the earlier behaviour
isn't hashed into the run key, and a missing one is filled with that value. So finished runs keep
their keys when an option is added, and a config frozen earlier runs on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf, open_dict

PACKAGE = "crl_exp."
MOVED = {
    "algorithms": "steering.policy.algorithms",
    "attribution": "steering.methods.attribution",
    "baselines.bag_of_words": "steering.methods.baselines.bag_of_words",
    "baselines.calibration": "steering.methods.baselines.calibration",
    "baselines.lora": "steering.methods.baselines.lora",
    "baselines.probe": "steering.methods.baselines.probe",
    "baselines.probe_steering": "steering.methods.baselines.probe_steering",
    "baselines.prompting": "steering.methods.baselines.prompting",
    "coefficients": "steering.coefficients",
    "controls": "steering.methods.controls",
    "layers": "experiments.layers",
    "listed": "steering.methods.listed",
    "methods": "steering.methods.crl",
    "methods.CorrSteerA": "steering.methods.corrsteer.CorrSteerA",
    "methods.CorrSteerP": "steering.methods.corrsteer.CorrSteerP",
    "methods.CorrSteerS": "steering.methods.corrsteer.CorrSteerS",
    "methods.NoSteering": "steering.methods.base.NoSteering",
    "stages.activation": "steering.stages.activation",
    "stages.author": "steering.stages.author",
    "stages.fusion": "steering.stages.fusion",
    "stages.mask": "steering.stages.mask",
    "stages.noise": "steering.stages.noise",
    "stages.threshold": "steering.stages.threshold",
    "tasks.tiny": "tasks.sums",
}
"""Modules and classes that a `_target_` names: first name → today's. The first is what run keys
hash. Where one moves, change its line, or add one; a line added keeps the name that it had."""
_FIRST = {now: first for first, now in MOVED.items()}


def _renamed(target: Any, names: dict[str, str]) -> Any:
    if not (isinstance(target, str) and target.startswith(PACKAGE)):
        return target
    name = target.removeprefix(PACKAGE)
    module, _, cls = name.rpartition(".")
    return PACKAGE + (names.get(name) or f"{names.get(module, module)}.{cls}")


def todays_name(target: Any) -> Any:
    """What a class that an earlier version's `_target_` names is called now."""
    return _renamed(target, MOVED)


def first_name(target: Any) -> Any:
    """What a class was called when `_target_` first named it: run keys hash this."""
    return _renamed(target, _FIRST)


def _with_targets(value: Any, name: Callable[[Any], Any]) -> Any:
    """A copy of a resolved config, every `_target_` in it renamed."""
    if isinstance(value, dict):
        return {
            key: name(of) if key == "_target_" else _with_targets(of, name)
            for key, of in value.items()
        }
    return [_with_targets(of, name) for of in value] if isinstance(value, list) else value


def _rename_targets(node: Any) -> None:
    """Give each class in a config its name of today."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    # By its nodes: asking a DictConfig for each value takes ten times as long.
    for key, child in list(node._content.items()):  # type: ignore[union-attr]
        if child._is_missing() or child._is_interpolation():
            continue
        if key != "_target_":
            _rename_targets(child)
        elif (now := todays_name(node[key])) != node[key]:
            node[key] = now


class Added(NamedTuple):
    """An option that earlier versions didn't have.

    section: of the config. target: end of the section's `_target_` (`CRL`), or "" where every class
    of the section has the key. meant: the value that does what earlier versions did. same: whether
    in a resolved config every value does that.
    """

    section: str
    target: str
    key: str
    meant: Any
    same: Callable[[dict[str, Any]], bool] = lambda plain: False


STEERING = {"_target_": "crl_exp.experiments.kinds.steering.Steering", "name": "steering"}
"""The kind of experiment that every run was before there were kinds: it isn't hashed."""


def is_steering(experiment: Any) -> bool:
    """Whether the section `experiment` of a config asks for that kind; None: there was no other."""
    return experiment is None or experiment.get("_target_") == STEERING["_target_"]


_BY_DEGREES = ("token_f1", "function", "judge", "preference_model")
"""Scorers whose rewards may lie between 0 and 1."""
_RIGHT_OR_WRONG = (
    "jsonl", "multiple_choice", "open_questions", "refusal", "refusal_sets", "sentiment", "tiny",
)  # fmt: skip


def all_or_nothing(plain: dict[str, Any]) -> bool:
    """Whether the task's rewards are known to be 0 or 1: those of these modules are, unless they
    are scored by the words shared with the answer. Of others nothing is known."""
    task = plain.get("task") or {}
    module = str(task.get("_target_", "")).rpartition(".")[0]
    known = module.removeprefix("crl_exp.tasks.") in _RIGHT_OR_WRONG
    return known and task.get("scorer") not in _BY_DEGREES and task.get("answer_kind") != "f1"


_WITHOUT_A_POLICY = (
    "NoSteering", "CorrSteerS", "CorrSteerA", "CorrSteerP", "RandomFeatures", "RandomDirection",
    "TopActivation", "RawResidual",
)  # fmt: skip


def starts_at_zero(plain: dict[str, Any]) -> bool:
    """Whether it is known that no first weight matters: networks are linear, or not trained, and no
    stage has weights of its own that start at random."""
    policy = plain.get("policy") or {}
    if _of_class(plain, "method", "CRL", "PublishedCRL") and _of_class(
        plain, "activation", "ReplacingAttention"
    ):
        return False
    untrained = _of_class(plain, "method", *_WITHOUT_A_POLICY) or (
        _of_class(plain, "method", "CRL") and not _trains(plain)
    )
    return untrained or not (policy.get("policy_depth", 1) or policy.get("critic_depth", 1))


def never_leaves_alone(plain: dict[str, Any]) -> bool:
    """Whether there is no null action, so that it doesn't matter what it would start from."""
    return not (plain.get("policy") or {}).get("null_action", False)


def unjudged(plain: dict[str, Any]) -> bool:
    """Whether no judge is asked, however one is described."""
    return (plain.get("task") or {}).get("scorer", "answer") != "judge"


def without_preferences(plain: dict[str, Any]) -> bool:
    """Whether no preference model scores, however one is described."""
    return (plain.get("task") or {}).get("scorer", "answer") != "preference_model"


NO_PREFERENCE_MODEL = {
    "path": None, "revision": None, "device": "cpu", "batch_size": 16, "map": "sigmoid",
    "digest": None,
}  # fmt: skip
"""Of runs of before there were such scorers."""
HOW_A_JUDGE_IS_ASKED = (
    "api_key_from", "timeout_seconds", "tries", "wait_seconds", "parallel",
)  # fmt: skip
"""What changes no reply, and so no key."""
NO_JUDGE = {
    "base_url": None, "model": None, "api_key_from": None, "template": "{answer}",
    "reply": "number", "max_tokens": 16, "timeout_seconds": 60.0, "tries": 5, "wait_seconds": 1.0,
    "parallel": 4,
}  # fmt: skip
"""Of runs of before there were judges."""


ADDED: tuple[Added, ...] = (
    Added("task", "", "train_seed", None),
    Added("task", "", "groups", None),
    Added("warmup", "", "rewarded", "half", same=all_or_nothing),
    Added("sae", "", "dictionary", "sae"),
    Added("task", "Sentiment", "wording", "plain"),
    Added("task", "Sentiment", "wordings", {}),
    Added("noise", "Gaussian", "on_policy", False),
    Added("noise", "EpsilonGreedy", "on_policy", False),
    Added("activation", "STETopK", "value", "probability"),
    Added("fusion", "Multiply", "negative", "raw"),
    Added("fusion", "OneOrCorr", "select", "quantile"),
    Added("fusion", "OneOrCorr", "selected", "corr"),
    Added("fusion", "ContextScale", "standardise", True),
    Added("fusion", "PositionLinear", "over", "answer"),
    Added("fusion", "Attention", "over", "answer"),
    Added("policy", "", "combine", "sum"),
    Added("model", "", "chat_template_args", {}),
    Added("task", "JsonLines", "length_normalised", False),
    Added("task", "Sentiment", "length_normalised", False),
    Added("task", "JsonLines", "choice_prefix", ""),
    Added("task", "Sentiment", "choice_prefix", ""),
    Added("policy", "", "first_weights", "by_seed", same=starts_at_zero),
    Added("policy", "", "null_action", False),
    Added("policy", "", "null_start", 0.5, same=never_leaves_alone),
    Added("policy", "", "doses", []),
    Added("warmup", "", "contrast", "reward"),
    Added("task", "JsonLines", "answer_kind", "choice"),
    Added("task", "JsonLines", "stop", []),
    Added("task", "JsonLines", "scorer", "answer"),
    Added("task", "JsonLines", "function", None),
    Added("task", "JsonLines", "function_source", None),
    Added("task", "JsonLines", "judge", NO_JUDGE, same=unjudged),
    Added("policy", "", "dose_growth", 0.0),
    Added("tracking", "", "target", "mlflow"),
    Added("tracking", "", "project", "crl_exp"),
    Added("tracking", "", "entity", None),
    Added("tracking", "", "mode", "offline"),
    Added("task", "JsonLines", "preference_model", NO_PREFERENCE_MODEL, same=without_preferences),
    Added("model", "", "device_map", None),
)
"""In the order in which they came. Add a line with each new option; never change one."""


def _get(plain: dict[str, Any], section: str, key: str) -> Any:
    """A value of a resolved config; None where there is no such."""
    found = plain.get(section)
    return found.get(key) if isinstance(found, dict) else None


_ONE_TOKEN = {"yes", "no", "true", "false", "positive", "negative"}
"""Words of one token each, capital or not, of every tokenizer of conf/model but GPT-2's."""


def several_tokens(plain: dict[str, Any]) -> bool:
    """Whether answers are restricted to options that may be several tokens.

    Which are is known to the tokenizer alone: what isn't sure to be one token counts.
    """
    choices = _get(plain, "task", "choices") or []
    kind = str(_get(plain, "task", "_target_")).rpartition(".")[2]
    if kind not in ("JsonLines", "Sentiment"):
        return False
    sure = set() if "gpt2" in str(_get(plain, "model", "path")) else _ONE_TOKEN
    return any(len(str(one)) > 1 and str(one).lower() not in sure for one in choices)


class Mended(NamedTuple):
    """A fault that was mended: results of the configs concerned aren't those of before.

    name: hashed into the run key of those configs, so that a result of before doesn't pass for one
    of now. concerns: whether a resolved config is one of them.
    """

    name: str
    concerns: Callable[[dict[str, Any]], bool]


def _of_class(plain: dict[str, Any], section: str, *names: str) -> bool:
    target = str((plain.get(section) or {}).get("_target_", ""))
    return target.rpartition(".")[2] in names


def _trains(plain: dict[str, Any]) -> bool:
    return _of_class(plain, "method", "CRL") and bool(plain["method"].get("stage2"))


def _without_stage_1(plain: dict[str, Any]) -> bool:
    """Whether a method's result hangs on no feature that stage 1 found."""
    method = plain.get("method") or {}
    by_itself = _of_class(plain, "method", "RawResidual") and not method.get("norm_match")
    return by_itself or _of_class(plain, "method", "NoSteering", "Listed", *_ADD_NO_FEATURE)


_ADD_NO_FEATURE = (  # that stage 1 knows of
    "BagOfWords", "Calibration", "Lora", "Probe", "ProbeSteering", "Prompting",
)  # fmt: skip


def _ranks_by_another_score(plain: dict[str, Any]) -> bool:
    """By one that was scaled in each layer: CorrSteer-S compares layers by it, a policy has it in
    its logits. At each layer by itself it ranked as it does now."""
    another = (plain.get("warmup") or {}).get("score", "pearson") != "pearson"
    return another and _of_class(plain, "method", "CRL", "PublishedCRL", "CorrSteerS")


def _steers_against_by_means(plain: dict[str, Any]) -> bool:
    against = (plain.get("warmup") or {}).get("negative") == "steer"
    by_means = _of_class(plain, "coefficient", "FromWarmup")
    means = by_means and plain["coefficient"].get("statistic") != "contrastive"
    return against and means and not _without_stage_1(plain)


def _attributes(plain: dict[str, Any]) -> bool:
    return _of_class(plain, "method", "Attribution")


def _weighs_answers(plain: dict[str, Any]) -> bool:
    algorithm = plain.get("algorithm") or {}
    per_answer = not algorithm.get("flatten_tokens", True) and algorithm.get("minibatches", 1) > 1
    return _trains(plain) and per_answer


def _tests_a_layer_more_than_once(plain: dict[str, Any]) -> bool:
    method = plain.get("method") or {}
    given = method.get("multipliers") or []  # as typed: whether they are numbers is checked later
    alike = not isinstance(given, list) or all(one == given[0] for one in given)
    several = not alike or method.get("n_candidates", 1) > 1
    return _of_class(plain, "method", "CorrSteerP") and several


def _gumbel_was_drawn_twice(plain: dict[str, Any]) -> bool:
    """A rollout of `gumbel_topk` drew from another distribution than the one it recorded."""
    free = (plain.get("method") or {}).get("features") == "free"
    return _trains(plain) and free and _of_class(plain, "activation", "GumbelTopK")


_ROWS = {("cais/mmlu", "validation"): 1531, ("TIGER-Lab/MMLU-Pro", "test"): 12032}
"""Of splits that validation is drawn from without train, on the hub."""


def _validation_may_be_filled_up(plain: dict[str, Any]) -> bool:
    """Whether validation's own split isn't known to hold enough, so that train's may give more."""
    task = plain.get("task") or {}
    sources, files = task.get("sources"), task.get("data_files")
    if not isinstance(sources, dict) or not (files is None or isinstance(files, dict)):
        return False
    own = sources["validation"]
    asked = sum(task[f"n_{part}"] for part in ("validation", "test") if sources[part] == own)
    whole = files is None and not task.get("groups")
    enough = whole and asked <= _ROWS.get((str(task.get("hub_id")), str(own)), 0)
    return own != sources["train"] and not enough


MENDED: tuple[Mended, ...] = (
    Mended("scores compared across layers as they are", _ranks_by_another_score),
    Mended(
        "steered against by means over failures",
        lambda plain: _steers_against_by_means(plain) and not _attributes(plain),
    ),
    Mended(
        "attribution takes away means over failures",
        lambda plain: _steers_against_by_means(plain) and _attributes(plain),
    ),
    Mended(
        "directions and features drawn by layer",
        lambda plain: _of_class(plain, "method", "RandomDirection", "RandomFeatures"),
    ),
    Mended("tokens of an answer counted in the whole rollout", _weighs_answers),
    Mended("gumbel_topk records the act's probability", _gumbel_was_drawn_twice),
    Mended("CorrSteer-P tests each layer once", _tests_a_layer_more_than_once),
    Mended(
        "evaluations sample by item",
        lambda plain: (
            _of_class(plain, "activation", "AlwaysGumbel")
            and _of_class(plain, "method", "CRL", "PublishedCRL")
            and plain["method"].get("features") == "free"
        ),
    ),
    Mended("validation filled up before train is drawn", _validation_may_be_filled_up),
    Mended(
        "shuffled labels drawn by the run's seed",  # all seeds had one permutation
        lambda plain: bool(_get(plain, "task", "shuffle_labels")),
    ),
    # Options of several tokens could never be right.
    Mended("options_of_several_tokens", several_tokens),
    # "I must refuse", "Sorry, no." are refusals (refusal_rule_v2).
    Mended("refusal_rule_v2", lambda plain: _get(plain, "task", "scorer") == "phrases"),
)


_CONTROLS = ("none", "random", "random_direction", "top_activation", "raw_residual")
_VARIANTS = ("crl", "corrsteer")


def facts_of_method(
    result: Mapping[str, Any], name: str, layers: Mapping[str, Any]
) -> dict[str, Any]:
    """What a report asks of a run's method, `control`, `unsteered`, `variant_of` and `chose_layer`:
    what its result says of it, or, as of a version before results did, by the method's name.

    result: {} of a run that has none. layers: that section of its config.
    """
    meant = {
        "control": name in _CONTROLS,
        "unsteered": name == "none",
        "variant_of": next((one for one in _VARIANTS if name.startswith(one)), ""),
        "chose_layer": _of_class({"layers": layers}, "layers", "BestOnValidation")
        and result.get("layers") != [],
    }
    return {key: result.get(key, value) for key, value in meant.items()}


TABLES = (("task", "wordings"),)
"""Keys that others are looked up in (`task.question`). What was found there is hashed; the table
isn't, so that an entry may be added to it."""


def without_tables(plain: dict[str, Any]) -> dict[str, Any]:
    """A resolved config without `TABLES`."""
    kept = {k: dict(v) if isinstance(v, dict) else v for k, v in plain.items()}
    for section, key in TABLES:
        if isinstance(kept.get(section), dict):
            kept[section].pop(key, None)
    return kept


def _without_steering(plain: dict[str, Any]) -> dict[str, Any]:
    """A resolved config that doesn't say that it is of the first kind of experiment."""
    if plain.get("experiment") in (None, STEERING):
        return {key: value for key, value in plain.items() if key != "experiment"}
    return plain


def fill_missing(config: DictConfig) -> None:
    """Give each option that came later, where it is missing, the value that meant what was, and
    each class its name of today."""
    _rename_targets(config)
    if config.get("experiment") is None:
        with open_dict(config):
            config.experiment = dict(STEERING)
    for added in ADDED:
        section = config.get(added.section)
        if not isinstance(section, DictConfig) or not _is_of(section.get("_target_"), added):
            continue
        if added.key not in section or OmegaConf.is_missing(section, added.key):
            with open_dict(section):
                section[added.key] = added.meant


def is_filled(plain: dict[str, Any]) -> bool:
    """Whether `fill_missing` would leave a resolved config as it is."""
    if plain.get("experiment") is None or not _has_todays_targets(plain):
        return False
    sections = ((added, plain.get(added.section)) for added in ADDED)
    return all(
        section.get(added.key, "???") != "???"
        for added, section in sections
        if isinstance(section, dict) and _is_of(section.get("_target_"), added)
    )


def _has_todays_targets(value: Any) -> bool:
    if not isinstance(value, dict):
        return True  # `_rename_targets` leaves lists alone
    return all(
        todays_name(of) == of if key == "_target_" else _has_todays_targets(of)
        for key, of in value.items()
    )


def filled_section(name: str, plain: Any) -> Any:
    """A section of a resolved config as `fill_missing` leaves it; a copy."""
    made = _with_todays_targets(plain)
    if not isinstance(made, dict):
        return made
    for added in ADDED:
        if added.section != name or not _is_of(made.get("_target_"), added):
            continue
        if made.get(added.key, "???") == "???":
            made[added.key] = copy.deepcopy(added.meant)
    return made


def _with_todays_targets(value: Any) -> Any:
    """As `_rename_targets` does, which leaves lists alone."""
    if not isinstance(value, dict):
        return copy.deepcopy(value)
    return {
        key: todays_name(of) if key == "_target_" else _with_todays_targets(of)
        for key, of in value.items()
    }


def as_compared(plain: dict[str, Any]) -> dict[str, Any]:
    """A resolved config with every option there: where all values or a missing one mean what
    earlier versions did, with the one that says so. Of configs that do the same it is the same."""
    plain = _with_targets(_without_steering(plain), first_name)
    found = {k: dict(v) if isinstance(v, dict) else v for k, v in plain.items()}
    for added in ADDED:
        section = found.get(added.section)
        if not isinstance(section, dict) or not _is_of(section.get("_target_"), added):
            continue
        if section.get(added.key, "???") == "???" or added.same(plain):
            section[added.key] = added.meant
    return _with_targets(found, todays_name)


def inert(plain: dict[str, Any]) -> set[str]:
    """Names (`policy.null_start`) of added options that do nothing in a resolved config."""
    plain = _with_targets(_without_steering(plain), first_name)
    return {f"{added.section}.{added.key}" for added in ADDED if added.same(plain)}


def mended_since(plain: dict[str, Any], key: str, content_key: Callable[[Any], str]) -> list[str]:
    """Faults that a run of this key and resolved config still has, mended since it ran."""
    now = hashed(plain)
    names = now.pop("mended", [])
    for n_known in range(len(names)):
        for known in combinations(names, n_known):
            if content_key({**now, **({"mended": list(known)} if known else {})}) == key:
                return [name for name in names if name not in known]
    return []


def hashed(plain: dict[str, Any]) -> dict[str, Any]:
    """A resolved config as its run key sees it: without what means the earlier behaviour."""
    plain = _with_targets(_without_steering(plain), first_name)
    kept = without_tables(plain)
    if isinstance(_get(kept, "task", "judge"), dict):
        asked = {k: v for k, v in kept["task"]["judge"].items() if k not in HOW_A_JUDGE_IS_ASKED}
        kept["task"] = {**kept["task"], "judge": asked}
    for added in ADDED:
        section = kept.get(added.section)
        if not isinstance(section, dict) or not _is_of(section.get("_target_"), added):
            continue
        if section.get(added.key, added.meant) in (added.meant, "???") or added.same(plain):
            section.pop(added.key, None)
    mended = sorted(m.name for m in MENDED if m.concerns(plain))
    return {**kept, "mended": mended} if mended else kept


def _is_of(target: Any, added: Added) -> bool:
    return not added.target or str(target or "").endswith(f".{added.target}")
