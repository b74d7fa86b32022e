"""Whole experiments on tiny models: folders as a user has them, and the overrides for them."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from crl_exp.experiments import config as configs
from crl_exp.experiments.run import run_experiment
from crl_exp.experiments.workspace import RunWorkspace
from crl_exp.launcher.command_line import register
from crl_exp.launcher.planning.compose import Composer
from crl_exp.runs.directory import RunDirectory
from crl_exp.tasks.base import Task
from tests.helpers import tiny

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
LAYERS = (0, 1, 2)

# What makes any composed experiment small. A key that a config doesn't have is left out.
SMALL = {
    "task.n_train": 24, "task.n_validation": 8, "task.n_test": 16,
    "algorithm.n_updates": 2, "algorithm.prompts_per_update": 8, "algorithm.validate_every": 1,
    "layers.layer": 1, "layers.layers": [0, 2], "layers.first": 0, "layers.last": 2,
    "method.multipliers": [1.0, 2.0],
    "warmup.keep": 5, "engine.batch_size": 16, "policy.hidden": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TinyFiles:
    """Folders made once a session: `models/KIND`, `saes/blocks.L.hook_resid_post`, `task.jsonl`."""

    root: Path

    def overrides(self, kind: str = "llama") -> list[str]:
        """An experiment on a tiny model, as it is typed; `output_dir` is left to the caller."""
        attention = "eager" if kind == "gemma2" else "sdpa"
        return [
            "tracking=none", "sae.name=tiny_sae", f"sae.folder={self.root / 'saes'}",
            "model.name=tiny", f"model.path={self.root / 'models' / kind}",
            f"model.attn_implementation={attention}",
            "task=jsonl", f"task.path={self.root / 'task.jsonl'}", "task.choices=[yes,no]",
        ]  # fmt: skip


def make_files(root: Path) -> TinyFiles:
    for kind in ("llama", "gemma2"):
        tiny.save_model(kind, root / "models" / kind)
    for layer in LAYERS:
        save_sae(root / "saes", layer, random_sae_weights(seed=layer))
    write_task(root / "task.jsonl", n=80)
    return TinyFiles(root)


def random_sae_weights(seed: int, d_in: int = tiny.D_MODEL, d_sae: int = tiny.D_SAE) -> dict:
    """Unit directions, the encoder's those of the decoder; features active about half the time."""
    draw = torch.Generator().manual_seed(seed)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=draw), dim=1)
    return {
        "W_dec": W_dec_FD,
        "W_enc": W_dec_FD.T.contiguous(),
        "b_enc": torch.zeros(d_sae),
        "b_dec": 0.1 * torch.randn(d_in, generator=draw),
        "threshold": torch.full((d_sae,), 0.05),
    }


def save_sae(
    folder: Path,
    layer: int,
    weights: dict,
    hook_layer: int | None = None,
    point: str = "post",
    said: dict[str, Any] | None = None,
    **shape: Any,
) -> Path:
    """Write a JumpReLU SAE as SAELens does, at `folder/blocks.LAYER.hook_resid_POINT`.

    said: more metadata. shape: more of SAELens' config.
    """
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig  # many tests have no need of its import
    from sae_lens.saes.sae import SAEMetadata

    d_sae, d_in = weights["W_dec"].shape
    site = f"blocks.{layer if hook_layer is None else hook_layer}.hook_resid_{point}"
    metadata = SAEMetadata(**{"hook_name": site, "model_name": "tiny", **(said or {})})
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, metadata=metadata, **shape))
    sae.load_state_dict(weights)
    path = folder / f"blocks.{layer}.hook_resid_{point}"
    sae.save_model(path)
    return path


def write_task(path: Path, n: int, seed: int = 0, answers: Sequence[str] = ("yes", "no")) -> Path:
    """Questions of 3 to 8 words of the tiny vocabulary, all different; answers drawn evenly."""
    draw = random.Random(seed)
    words = [word for word in tiny.WORDS if word.startswith("w")]
    questions: set[str] = set()
    while len(questions) < n:
        questions.add(" ".join(draw.choices(words, k=draw.randint(3, 8))))
    rows = [{"question": q, "answer": draw.choice(list(answers))} for q in sorted(questions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def composed(overrides: Sequence[str]) -> DictConfig:
    """A config as `launch.py` gets it, every file read anew."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@functools.cache
def composer() -> Composer:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return Composer(loader, loader.load_configuration("config", [], RunMode.RUN))


def quickly_composed(overrides: Sequence[str]) -> DictConfig:
    """The same config as the launchers get it, the files of each choice of options read once."""
    return composer().config(overrides)[0]


def small(overrides: Sequence[str]) -> DictConfig:
    """A composed config made small, except where the overrides say otherwise."""
    plain = quickly_composed(overrides)
    typed = {override.split("=")[0] for override in overrides}
    for key, value in SMALL.items():
        if key not in typed and OmegaConf.select(plain, key) is not None:
            OmegaConf.update(plain, key, value)
    return plain


def run_small(overrides: Sequence[str], skip_finished: bool = False) -> tuple[dict[str, Any], Path]:
    """Run an experiment in this process; returns its result and its run directory."""
    config = small(overrides)
    result = run_experiment(config, skip_finished)
    assert result is not None
    return result, RunDirectory(config).path


def lab_of(overrides: Sequence[str], task: Task | None = None) -> RunWorkspace:
    """An experiment's workspace, with another task in place of the config's if one is given."""
    config = small(overrides)
    exp = configs.experiment(config)
    if task is not None:
        exp.task = task
    layers = configs.validate(exp)
    run = RunDirectory(config)
    run.path.mkdir(parents=True, exist_ok=True)
    return RunWorkspace(exp, layers, run)
