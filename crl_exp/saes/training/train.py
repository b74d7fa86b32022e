"""One SAE a layer, trained and saved by SAELens.

Shapes: N rows, B rows of a batch, D d_model, F d_sae.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from crl_exp.config.errors import UserError
from crl_exp.saes.training.residuals import Residuals
from crl_exp.saes.training.specialists import (
    SpecialistConfig,
    clear,
    install,
    least_used,
    unexplained,
)

# What a weight may be stored as. SAELens casts every tensor to its own dtype on loading.
STORED = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


@dataclass
class TrainingConfig:
    """d_sae: features. k: mean number active on a token (BatchTopK).

    rows: training rows drawn for each layer, in epochs over the collected ones.
    steered_repeats: how often a steered position is drawn for once of any other.
    last_repeats: the same for the last prompt token.
    warmup_share, decay_share: parts of the steps in which the learning rate rises and falls.
    dead_after: steps without firing after which a feature takes the auxiliary loss.
    autocast: bfloat16 matrix products.
    store: dtype that each weight is rounded to on saving.
    specialists: features for the last prompt token.
    """

    d_sae: int
    k: int
    rows: int
    batch_size: int
    lr: float
    warmup_share: float
    decay_share: float
    dead_after: int
    steered_repeats: int
    last_repeats: int
    autocast: bool
    store: dict[str, str]
    specialists: SpecialistConfig
    seed: int


def draw_rows(residuals: Residuals, config: TrainingConfig) -> Tensor:
    """Row numbers of one epoch, each row as often as its position is worth."""
    repeats_N = torch.ones(len(residuals), dtype=torch.long)
    repeats_N[residuals.steered_N] = config.steered_repeats
    repeats_N[residuals.last_N] = config.last_repeats
    return torch.arange(len(residuals)).repeat_interleave(repeats_N)


def row_batches(rows_ND: Tensor, drawn: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless float32 batches [B, D], shuffled anew each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = drawn[torch.randperm(len(drawn), generator=generator)]
        for at in range(0, len(order) - batch_size + 1, batch_size):
            yield rows_ND[order[at : at + batch_size]].float()


def hook_name(layer: int) -> str:
    """The output of decoder layer `layer`, in SAELens' words."""
    return f"blocks.{layer}.hook_resid_post"


def train_layer(
    residuals: Residuals, layer: int, config: TrainingConfig, model_name: str, dataset: str
) -> Any:
    """Train the SAE of one layer; returns it as a JumpReLU SAE, float32, on the CPU.

    Raises `UserError` where the rows don't fill a batch, and where a weight isn't finite.
    """
    metadata = SAEMetadata(
        model_name=model_name,
        hook_name=hook_name(layer),
        hook_layer=layer,
        prepend_bos=False,
        dataset_path=dataset,
    )
    rows_ND = residuals.by_layer[layer]
    sae = as_jumprelu(fit(rows_ND, draw_rows(residuals, config), config, metadata))
    if config.specialists.n_features:
        _add_specialists(sae, residuals, rows_ND, config)
    if bad := not_finite(sae.state_dict()):
        raise UserError(
            f"layer {layer}: the trained SAE's {', '.join(bad)} aren't finite, so it isn't saved; "
            f"lower training.lr={config.lr:g} (or that of training.specialists)"
        )
    return sae


def not_finite(weights: dict[str, Tensor]) -> list[str]:
    """Names of the weights that hold an infinite number or none."""
    return [name for name, weight in weights.items() if not weight.float().isfinite().all()]


def _add_specialists(
    sae: Any, residuals: Residuals, rows_ND: Tensor, config: TrainingConfig
) -> None:
    chosen = config.specialists
    generator = torch.Generator().manual_seed(config.seed)
    other = torch.nonzero(~residuals.last_N).flatten()
    other = other[torch.randperm(len(other), generator=generator)[: chosen.gate_rows]]
    last_ND, other_ND = rows_ND[residuals.last_N].float(), rows_ND[other].float()
    clear(sae, least_used(sae, torch.cat([other_ND, last_ND]), chosen.n_features))
    error = unexplained(sae, last_ND)
    small = replace(
        config,
        d_sae=chosen.n_features - 1,  # and one that is always on
        k=chosen.k,
        rows=chosen.rows,
        batch_size=chosen.batch_size,
        lr=chosen.lr,
    )
    with torch.no_grad():
        error_ND = error(last_ND - sae.b_dec)
    special = as_jumprelu(fit(error_ND, torch.arange(len(error_ND)), small, SAEMetadata()))
    install(sae, special, error, last_ND, other_ND, chosen.gate_shut)


def as_jumprelu(sae: BatchTopKTrainingSAE) -> Any:
    """What SAELens saves of a trained BatchTopK SAE, read back."""
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder, device="cpu", dtype="float32").requires_grad_(False)


def fit(
    rows_ND: Tensor, drawn: Tensor, config: TrainingConfig, metadata: SAEMetadata
) -> BatchTopKTrainingSAE:
    """Train on the rows numbered by `drawn`.

    The input is scaled to a mean norm of sqrt(D) and `b_dec` starts at the mean: with it at zero
    most features died. SAELens folds the scale back at the end.
    """
    if len(drawn) < config.batch_size or config.rows < config.batch_size:
        raise UserError(
            f"{min(len(drawn), config.rows)} training rows don't fill one batch of "
            f"{config.batch_size}; lower training.batch_size (or that of "
            "training.specialists), or give more text"
        )
    torch.manual_seed(config.seed)
    d_in = rows_ND.shape[1]
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=d_in,
            d_sae=config.d_sae,
            k=config.k,
            normalize_activations="expected_average_only_in",
            metadata=metadata,
        )
    )
    sample_ND = rows_ND[drawn[torch.randperm(len(drawn))[:20_000]]].float()
    scale = d_in**0.5 / float(sample_ND.norm(dim=1).mean())
    sae.b_dec.data = sample_ND.mean(0) * scale
    batches = row_batches(rows_ND, drawn, config.batch_size, config.seed)
    trainer = SAETrainer(_trainer_config(config), sae, batches)
    trainer.activation_scaler.scaling_factor = scale
    trainer.fit()
    return sae


def _trainer_config(config: TrainingConfig) -> SAETrainerConfig:
    steps = config.rows // config.batch_size
    return SAETrainerConfig(
        total_training_samples=steps * config.batch_size,
        train_batch_size_samples=config.batch_size,
        lr=config.lr,
        lr_end=config.lr,
        lr_warm_up_steps=max(2, round(steps * config.warmup_share)),
        lr_decay_steps=round(steps * config.decay_share),
        dead_feature_window=config.dead_after,
        autocast=config.autocast,
    )


def save_rounded(sae: Any, folder: Path, store: dict[str, str]) -> None:
    """Save a JumpReLU SAE in SAELens' format, each weight rounded to its stored dtype.

    Raises `UserError` for an unknown weight or dtype, and for one that doesn't hold the weight.
    """
    sae.save_model(folder)
    path = folder / SAE_WEIGHTS_FILENAME
    weights = load_file(path)
    for name, dtype in store.items():
        if name not in weights or dtype not in STORED:
            raise UserError(
                f"training.store.{name}={dtype}: weights are {', '.join(sorted(weights))}; "
                f"dtypes are {', '.join(STORED)}"
            )
        weights[name] = weights[name].to(STORED[dtype])
    if bad := not_finite(weights):
        path.unlink()
        raise UserError(
            f"{', '.join(bad)} {'is' if len(bad) == 1 else 'are'} too large for the dtypes that "
            "training.store names; store as float32"
        )
    save_file(weights, path)
    path.chmod(0o644)  # safetensors writes files that only their owner can read
