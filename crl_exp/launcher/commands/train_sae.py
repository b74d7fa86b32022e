"""`python -m crl_exp train-sae`: trains, rounds, measures and describes the SAEs of a model.

One pass of the model collects the residuals of all layers; SAELens trains one BatchTopK SAE a
layer. Config: `sae_training/train_sae.yaml`, apart from `conf/`, where `layers` is a group; the
default writes the SAEs that ship under `assets/`.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from tqdm.auto import tqdm

from crl_exp.config.errors import UserError
from crl_exp.config.paths import REPO
from crl_exp.config.sections import number_faults
from crl_exp.experiments.config import build
from crl_exp.launcher.command_line import people_errors
from crl_exp.models.config import ModelConfig
from crl_exp.models.language_model import LanguageModel, load_model
from crl_exp.saes.training.quality import (
    QualityConfig,
    card,
    ce_documents,
    cross_entropy,
    on_model,
    on_rows,
    useless,
)
from crl_exp.saes.training.residuals import (
    ResidualConfig,
    Residuals,
    collect,
    drop_outliers,
    norm_limits,
)
from crl_exp.saes.training.text import (
    Document,
    HeldOut,
    TextConfig,
    chat_documents,
    plain_documents,
    split_documents,
    with_answers,
)
from crl_exp.saes.training.train import TrainingConfig, hook_name, save_rounded, train_layer
from crl_exp.tasks.base import Task

log = logging.getLogger(__name__)


@dataclass
class TrainSaeConfig:
    """model: whose residuals. tasks: each one's training prompts are read, by name.

    layers: decoder layers whose output gets an SAE. out: folder that takes one folder a layer.
    """

    model: ModelConfig
    tasks: dict[str, Any]
    layers: list[int]
    out: str
    text: TextConfig
    residuals: ResidualConfig
    training: TrainingConfig
    quality: QualityConfig


ConfigStore.instance().store(name="train_sae_schema", node=TrainSaeConfig)


def build_documents(
    lm: LanguageModel, tasks: dict[str, Task], config: TextConfig
) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, neither with an item that a task validates or tests on."""
    splits = {name: task.splits() for name, task in tasks.items()}
    held_out = HeldOut(splits.values())
    unknown = set(config.answers) - set(tasks)
    if unknown:
        raise UserError(f"text.answers names {sorted(unknown)}, but tasks has {sorted(tasks)}")
    documents = plain_documents(lm, config, held_out)
    for name, split in splits.items():
        documents += chat_documents(lm, name, split.train, config, held_out)
    with tqdm(total=sum(config.answers.values()), desc="Answering prompts", unit="prompt") as bar:
        documents = with_answers(lm, documents, config, bar.update)
    return split_documents(documents, config)


def gather(
    lm: LanguageModel, documents: Sequence[Document], layers: Sequence[int], config: ResidualConfig
) -> Residuals:
    """Residuals with a progress bar, outliers still in."""
    total = sum(len(d.ids) - len(d.opening) for d in documents)
    with tqdm(total=total, desc="Collecting residuals", unit="token") as bar:
        return collect(lm, documents, layers, config, bar.update)


def measure(
    lm: LanguageModel,
    saes: dict[int, Any],
    held: Residuals,
    documents: Sequence[Document],
    folder: Path,
    config: QualityConfig,
) -> dict[int, dict[str, Any]]:
    """Quality of each saved SAE, read back from its folder as a user would."""
    from sae_lens import SAE

    chosen = ce_documents(documents, config.ce_tokens)
    clean = cross_entropy(lm, chosen, config)
    figures: dict[int, dict[str, Any]] = {}
    for layer, full in track(saes.items(), description="Measuring"):
        sae = SAE.load_from_disk(folder / hook_name(layer), device="cpu", dtype="float32")
        figures[layer] = {
            **on_rows(sae, held, layer),
            **on_model(lm, sae, full.eval(), held, chosen, layer, config, clean),
        }
    return figures


def check(config: TrainSaeConfig, n_layers: int) -> None:
    """Raises `UserError` for layers that don't exist or have none before them to compare with, and
    for a folder with SAEs of other layers, whose card would be written over."""
    bad = [x for x in config.layers if not 1 <= x < n_layers]
    if bad or not config.layers:
        raise UserError(
            f"layers={list(config.layers)}: choose from 1 to {n_layers - 1}, e.g. layers=[8,15]"
        )
    if len(set(config.layers)) < len(config.layers):
        raise UserError(f"layers={list(config.layers)}: holds a layer twice; list each once")
    ours = {hook_name(layer) for layer in config.layers}
    others = sorted({path.parent.name for path in Path(config.out).glob("*/cfg.json")} - ours)
    if others:
        raise UserError(
            f"out={config.out} holds SAEs that aren't trained now ({', '.join(others)}); set "
            "out=saes/mine, or any other folder"
        )


def source_counts(documents: Sequence[Document]) -> dict[str, int]:
    """Tokens trained on, by source."""
    counts: dict[str, int] = {}
    for document in documents:
        kept = len(document.ids) - document.n_skip
        counts[document.source] = counts.get(document.source, 0) + kept
    return dict(sorted(counts.items()))


def train_all(rows: Residuals, config: TrainSaeConfig, dataset: str) -> dict[int, Any]:
    """Train and save each layer's SAE; returns them as they were before rounding."""
    saes = {}
    for layer in config.layers:
        started = time.monotonic()
        saes[layer] = train_layer(rows, layer, config.training, config.model.name, dataset)
        save_rounded(saes[layer], Path(config.out) / hook_name(layer), config.training.store)
        log.info("layer %d trained in %.0f s", layer, time.monotonic() - started)
    return saes


def run(config: TrainSaeConfig, tasks: dict[str, Task], command: str) -> dict[int, dict[str, Any]]:
    """Train all layers, save them rounded, measure what was saved; returns the figures.

    Raises `UserError` as `check` does, and for a model that is spread over devices.
    """
    if config.model.device_map is not None:
        raise UserError(
            f"model.device_map={config.model.device_map}: train-sae runs the lower layers of a "
            "model by themselves, on one device; set model.device_map=null, and "
            "model.quantization=int8 or nf4 where it doesn't fit"
        )
    lm = load_model(config.model)
    check(config, lm.n_layers)
    training, held_documents = build_documents(lm, tasks, config.text)
    rows = gather(lm, training, config.layers, config.residuals)
    limits = norm_limits(rows, config.residuals.outlier_factor)
    rows = drop_outliers(rows, limits)
    log.info("%d rows kept, %d outliers dropped", len(rows), rows.n_dropped)

    sources = source_counts(training)
    saes = train_all(rows, config, dataset="+".join(sources))
    compared = [x - step for x in config.layers for step in (0, 1)]
    held = gather(lm, held_documents, compared, config.residuals)
    held = drop_outliers(held, norm_limits(held, config.residuals.outlier_factor) | limits)
    figures = measure(lm, saes, held, held_documents, Path(config.out), config.quality)
    trained_on = {
        "tokens_collected": len(rows),
        "tokens_by_source": sources,
        "rows_trained": config.training.rows,
        "outliers_dropped": rows.n_dropped,
        "stored_as": dict(config.training.store),
        "command": command,
    }
    for layer, found in figures.items():
        found |= trained_on
        path = Path(config.out) / hook_name(layer) / "quality.json"
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    write_card(config, command, figures)
    return figures


CARD_NOTES = """\
- BatchTopK, k={k}, {d_sae:,} features, trained by SAELens and saved as JumpReLU SAEs. Load one with
  `SAE.load_from_disk(folder, device="cpu", dtype="float32")`.
- Each is for the output of its decoder layer (`hook_resid_post`), at every token but the first of a
  text and the opening of the chat template.
- {specialists} of the features are specialists for the last prompt token of the tasks' chat
  prompts (`metadata.specialist_features` in cfg.json lists them). The residual varies little
  there, and a general SAE alone shows the same dozen features for every prompt. They are fitted
  to the wording of the prompts: train anew for another wording or chat template.
- Stored as: {stored}. The figures are of the stored weights; "unrounded" is before.
- Trained on {tokens:,} tokens, {rows:,} rows a layer (several epochs; the end of chat prompts and
  the answers more often). Tokens by source: {sources}.
- Measured on {held:,} tokens of other texts from the same sources (cross-entropy: the first
  {ce_tokens:,}). Neither set holds an item that a task validates or tests on.
- "One layer off" is the explained variance when the SAE reads its layer's input. "Dead" is the
  share of features active on no held-out token. CE recovered is (ablated - with SAE) / (ablated -
  clean), the residual ablated to its mean or to zero. "Varied features" are active on 2 % to 98 %
  of the held-out last prompt tokens.
- The text is Hutto & Gilbert's (ICWSM 2014, MIT licence) and the tasks' training prompts, with the
  model's own answers where `text.answers` asks for them. The weights are released under
  Apache-2.0, like the model's."""


def write_card(config: TrainSaeConfig, command: str, figures: dict[int, dict[str, Any]]) -> None:
    """The README beside the layers' folders."""
    any_layer = next(iter(figures.values()))
    notes = CARD_NOTES.format(
        k=config.training.k,
        d_sae=config.training.d_sae,
        stored=", ".join(f"{name} {dtype}" for name, dtype in config.training.store.items()),
        tokens=any_layer["tokens_collected"],
        rows=config.training.rows,
        specialists=config.training.specialists.n_features,
        sources=", ".join(f"{k} {n:,}" for k, n in any_layer["tokens_by_source"].items()),
        held=any_layer["tokens_held_out"],
        ce_tokens=config.quality.ce_tokens,
    )
    text = card(config.model.name, command, notes, figures)
    (Path(config.out) / "README.md").write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exits with 1 where an SAE is of no use; it is saved all the same."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are printed here
    if argv is not None:
        sys.argv = ["train-sae", *argv]  # Hydra reads it from there
    with people_errors():
        _train()
    return 0


@hydra.main(version_base="1.3", config_path=str(REPO / "sae_training"), config_name="train_sae")
def _train(raw: DictConfig) -> None:
    command = " ".join(["python -m crl_exp train-sae", *map(shlex.quote, sys.argv[1:])])
    tasks = {str(name): build(task, f"tasks.{name}", Task) for name, task in raw.tasks.items()}
    if faults := list(number_faults("", OmegaConf.to_container(raw, resolve=True))):
        raise UserError("\n".join(fault.removeprefix(".") for fault in faults))
    config = OmegaConf.to_object(raw)
    assert isinstance(config, TrainSaeConfig)
    if faults := useless(run(config, tasks, command)):
        raise UserError("\n".join([*faults, f"They are in {config.out}, with their figures"]))
