"""Every number of every option: one that nothing can mean is refused by its key, before anything
runs, and the largest that are taken end in a result or in an error for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from crl_exp.config.errors import UserError
from crl_exp.config.sections import LARGEST
from crl_exp.experiments import config as configs
from tests.helpers.tiny_run import CONF, quickly_composed, run_small

GROUPS = sorted(
    (group, path.stem)
    for group in (*configs.PARTS, *configs.TYPED)
    for path in (CONF / group).glob("*.yaml")
)


def numbers(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each number and each list of numbers in a section, by its key."""
    for key, value in node.items():
        one = value[0] if isinstance(value, list) and value else value
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(one, int | float) and not isinstance(one, bool):
            yield f"{prefix}{key}", value


KNOWN = configs.Known()  # sections beside the one with the number are made once


def told(config: DictConfig, values: dict[str, Any]) -> str:
    """What a config with these values is refused with, a line for each."""
    before = {key: OmegaConf.select(config, key) for key in values}
    for key, bad in values.items():
        OmegaConf.update(config, key, bad, merge=False)
    try:
        configs.experiment(config, KNOWN)
    except UserError as error:
        return str(error)
    finally:
        for key, value in before.items():
            OmegaConf.update(config, key, value, merge=False)
    return f"{values} was taken"


@pytest.mark.parametrize(("group", "option"), GROUPS, ids=str)
def test_a_number_that_nothing_can_mean_is_refused_by_its_key(group, option):
    config = quickly_composed([f"{group}={option}"])
    section: Any = OmegaConf.to_container(config[group])
    for key, value in section.items():
        if value == "???":  # to be given by the user
            config[group][key] = "given"
    floats = [float("inf"), float("-inf"), float("nan"), 1e300, -1e30, 2 * LARGEST]
    whole = [2**63, -(10**30)] * 3
    for bad_float, bad_whole in zip(floats, whole, strict=True):
        values = {}
        for key, value in numbers(section, f"{group}."):
            one = value[0] if isinstance(value, list) else value
            bad = bad_float if isinstance(one, float) else bad_whole
            values[key] = [bad] if isinstance(value, list) else bad
        said = told(config, values).splitlines() if values else []
        for key in values:
            of_it = [line for line in said if line.startswith(f"{key}=")]
            assert of_it and "must be" in of_it[0], (key, said)


@pytest.mark.parametrize("seed", [2**63 - 1, 2**70, -(2**63)])
def test_a_seed_fits_into_64_bits(seed):
    said = told(quickly_composed([]), {"seed": seed})
    assert f"seed={seed}: must be a whole number below 2^63" in said


def test_a_number_where_null_is_meant_is_none_too_many():
    assert "was taken" in told(quickly_composed([]), {"tracking.system_seconds": None})


@pytest.mark.parametrize(
    "extreme",
    ["algorithm.lr_policy=1e9", "algorithm.lr_critic=1e9", "coefficient.multiplier=1e9",
     "method=corrsteer_s method.multipliers=[1e9]", "noise=gaussian noise.std=1e9",
     "activation=softmax activation.temperature=1e-300"],
)  # fmt: skip
def test_the_largest_numbers_end_in_a_result_or_an_error(extreme, tiny_files, tmp_path):
    overrides = [*tiny_files.overrides(), *extreme.split(), f"output_dir={tmp_path}"]
    try:
        result, _ = run_small(overrides)
    except UserError:
        return
    assert 0 <= result["accuracy_steered"] <= 1
