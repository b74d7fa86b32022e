"""A tiny model whose SAE holds a feature that raises the reward; see docs/planted_feature.md."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from torch import Tensor

from crl_exp.models.language_model import LanguageModel
from tests.helpers import tiny
from tests.helpers.tiny_run import random_sae_weights, save_sae, write_task

LAYER, PLANTED, OTHER, DEAD = 1, 37, 21, 8
MODEL_SEED, SAE_SEED, TASK_SEED = 2, 0, 0
YES, NO = tiny.WORDS.index("yes"), tiny.WORDS.index("no")
MARKERS = {"w50": "yes", "w51": "no"}
"""In the conditional variant the word that ends a question, and the answer that is then right."""


def plant(root: Path) -> list[str]:
    """Write model, SAE and task; returns the overrides of an experiment on them.

    Every answer is "yes" by right, so an item is rewarded where the model says yes.
    """
    path = write_task(root / "task.jsonl", n=1000, seed=TASK_SEED, answers=("yes",))
    return _written(root, path, both=False)


def plant_conditional(root: Path) -> list[str]:
    """As `plant`, but which answer is right depends on the question's last word.

    PLANTED moves the model towards yes, OTHER towards no by the same length: each helps on half of
    the questions and hurts on the other half.
    """
    path, draw = root / "task.jsonl", random.Random(TASK_SEED)
    words = [f"w{i}" for i in range(50)]
    questions: dict[str, str] = {}
    while len(questions) < 1000:
        marker = draw.choice(list(MARKERS))
        ending = " ".join([marker] * 3)
        questions[f"{' '.join(draw.choices(words, k=draw.randint(3, 5)))} {ending}"] = marker
    rows = [{"question": q, "answer": MARKERS[marker]} for q, marker in questions.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _written(root, path, both=True)


def _written(root: Path, path: Path, both: bool) -> list[str]:
    """Write model and SAE; returns the overrides. both: OTHER is planted too."""
    tiny.save_model("llama", root / "model", MODEL_SEED)
    lm = tiny.language_model("llama", MODEL_SEED)
    x_ND, direction_D = towards_yes(
        lm, [f"w{i} w{(7 * i) % 58} w{(3 * i) % 58}" for i in range(58)]
    )
    save_sae(root / "saes", LAYER, sae_weights(x_ND, direction_D, both))
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


def sae_weights(x_ND: Tensor, direction_D: Tensor, both: bool) -> dict:
    """A JumpReLU SAE of random directions, with this one in the place of feature PLANTED, and its
    opposite, if `both`, in the place of OTHER.

    Biases are such that the first DEAD features are never active, so that stage 1 leaves them out,
    and the others are on half of the residuals given.
    """
    weights = random_sae_weights(SAE_SEED)
    weights["W_dec"][PLANTED] = direction_D
    if both:
        weights["W_dec"][OTHER] = -direction_D
    weights["W_enc"] = weights["W_dec"].T.contiguous()
    weights["b_dec"] = torch.zeros_like(weights["b_dec"])
    weights["b_enc"] = -(x_ND @ weights["W_enc"]).median(dim=0).values
    weights["b_enc"][:DEAD] = -1000.0
    weights["threshold"] = torch.full_like(weights["threshold"], 1e-3)
    return weights
