"""What stage 1 sets against what: rewarded against unrewarded answers, harmful against benign
prompts, or refusals against other answers (`warmup.contrast`).

Shapes: I training items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from crl_exp.config.errors import UserError
from crl_exp.tasks.base import Task
from crl_exp.tasks.data.items import Item

if TYPE_CHECKING:  # the config is read without torch
    from torch import Tensor

CONTRASTS = ("reward", "benign", "refused")
OTHERS = "set warmup.contrast=reward, or take a task with both kinds (refusal, refusal_128, xstest)"


def contrast_faults(contrast: str, task: Task) -> list[str]:
    """Why stage 1 can't set harmful prompts against benign ones, where it is asked to."""
    why = "" if contrast == "reward" else task.why_no_benign()
    return [f"warmup.contrast={contrast}: {why}; {OTHERS}"] if why else []


def harm(contrast: str, task: Task, train: Sequence[Item]) -> Tensor | None:
    """Which training prompts are harmful [I], float32, where `contrasted` asks for it; None where
    stage 1 takes the rewards themselves.

    The difference of the means over the two kinds is the direction of Arditi et al. (arXiv
    2406.11717). Raises `UserError` where all training items are of one kind.
    """
    import torch

    if contrast == "reward":
        return None
    harm_I = torch.tensor([float(not task.is_benign(item)) for item in train])
    if float(harm_I.min()) == float(harm_I.max()):
        kind = "harmful" if float(harm_I[0]) else "benign"
        raise UserError(
            f"warmup.contrast={contrast}: all {len(harm_I)} training items of task={task.name} are "
            f"{kind} (task.groups={task.groups}), so there is nothing to set them against; draw "
            "items of both kinds, or set warmup.contrast=reward"
        )
    return harm_I


def contrasted(contrast: str, reward_B: Tensor, harm_B: Tensor | None) -> Tensor:
    """What stage 1 takes in place of the rewards [B].

    benign: whether a prompt is harmful, whatever was answered. refused: whether it was refused,
    which is the reward of a harmful prompt, and of a benign one what the reward lacks to 1.
    """
    if harm_B is None:
        return reward_B
    if contrast == "benign":
        return harm_B
    refused_B = reward_B.new_tensor(1.0) - reward_B
    return reward_B.where(harm_B.to(reward_B.device) > 0, refused_B)
