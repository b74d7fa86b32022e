"""A tiny model whose SAE holds a feature that raises the reward; see docs/planted_feature.md."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from crl_exp.models import LanguageModel
from tests import tiny
from tests.tiny_run import random_sae_weights, save_sae, write_task

LAYER, PLANTED, DEAD = 1, 37, 8
MODEL_SEED, SAE_SEED, TASK_SEED = 2, 0, 0
YES, NO = tiny.WORDS.index("yes"), tiny.WORDS.index("no")


def plant(root: Path) -> list[str]:
    """Write model, SAE and task; returns the overrides of an experiment on them.

    Every answer is "yes" by right, so an item is rewarded where the model says yes.
    """
    tiny.save_model("llama", root / "model", MODEL_SEED)
    path = write_task(root / "task.jsonl", n=1000, seed=TASK_SEED, answers=("yes",))
    lm = tiny.language_model("llama", MODEL_SEED)
    x_ND, direction_D = towards_yes(
        lm, [f"w{i} w{(7 * i) % 58} w{(3 * i) % 58}" for i in range(58)]
    )
    save_sae(root / "saes", LAYER, sae_weights(x_ND, direction_D))
    return [
        "tracking=none", "sae.name=planted", f"sae.folder={root / 'saes'}",
        "model.name=tiny", f"model.path={root / 'model'}",
        "task=jsonl", f"task.path={path}", "task.choices=[yes,no]",
        f"layers.layer={LAYER}",
    ]  # fmt: skip


def towards_yes(lm: LanguageModel, users: list[str]) -> tuple[Tensor, Tensor]:
    """Last-token residuals [N, D] at the output of LAYER, and the unit direction [D] there along
    which logit(yes) - logit(no) rises fastest, averaged over the prompts."""
    residuals, gradients = [], []

    def watch(_module, _inputs, output):
        hidden = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
        residuals.append(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = lm.layers[LAYER].register_forward_hook(watch)
    for user in users:
        ids = torch.tensor([lm.prompt_ids(user, chat_template=True)])
        logits_V = lm.model(input_ids=ids).logits[0, -1]
        (gradient,) = torch.autograd.grad(logits_V[YES] - logits_V[NO], residuals[-1])
        gradients.append(gradient[0, -1])
    handle.remove()
    x_ND = torch.stack([hidden.detach()[0, -1] for hidden in residuals])
    return x_ND, torch.nn.functional.normalize(torch.stack(gradients).mean(0), dim=0)


def sae_weights(x_ND: Tensor, direction_D: Tensor) -> dict:
    """A JumpReLU SAE of random directions, with this one in the place of feature PLANTED.

    Biases are such that the first DEAD features are never active, so that stage 1 leaves them out,
    and the others are on half of the residuals given.
    """
    weights = random_sae_weights(SAE_SEED)
    weights["W_dec"][PLANTED] = direction_D
    weights["W_enc"] = weights["W_dec"].T.contiguous()
    weights["b_dec"] = torch.zeros_like(weights["b_dec"])
    weights["b_enc"] = -(x_ND @ weights["W_enc"]).median(dim=0).values
    weights["b_enc"][:DEAD] = -1000.0
    weights["threshold"] = torch.full_like(weights["threshold"], 1e-3)
    return weights
