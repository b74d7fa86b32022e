"""The entry point: `python launch.py [OPTION=CHOICE …] [section.key=value …]`, `-m` for a sweep."""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from crl_exp.cli import people_errors, register


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    from crl_exp.experiment import run_experiment

    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    result = run_experiment(config, skip_finished=in_sweep)
    return None if result is None else result["accuracy_steered"]


if __name__ == "__main__":
    register()
    with people_errors():
        main()
