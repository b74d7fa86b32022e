"""What stage 1 sets against what: rewarded against unrewarded answers, or harmful against benign
prompts (`warmup.contrast`).

Shapes: I training items.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_exp.errors import UserError

if TYPE_CHECKING:  # the config is read without torch
    from torch import Tensor

    from crl_exp.config import Experiment
    from crl_exp.lab import Lab

CONTRASTS = ("reward", "benign")
OTHERS = "set warmup.contrast=reward, or take a task with both kinds (refusal, refusal_128, xstest)"


def contrast_faults(exp: Experiment) -> list[str]:
    """Why stage 1 can't set harmful prompts against benign ones, where it is asked to."""
    why = exp.task.why_no_benign() if exp.warmup.contrast == "benign" else ""
    return [f"warmup.contrast=benign: {why}; {OTHERS}"] if why else []


def contrast_cautions(exp: Experiment) -> list[str]:
    if exp.warmup.contrast == "reward" or exp.method.needs_statistics:
        return []
    return [
        f"warmup.contrast={exp.warmup.contrast}: does nothing with method={exp.method.name}, "
        "which has no stage 1"
    ]


def harm(lab: Lab) -> Tensor | None:
    """What stage 1 takes in place of the rewards [I], float32: 1 for harmful training prompts, 0
    for benign ones; None where it takes the rewards themselves.

    The difference of the means over the two kinds is the direction of Arditi et al. (arXiv
    2406.11717). Raises `UserError` where all training items are of one kind.
    """
    import torch

    if lab.exp.warmup.contrast == "reward":
        return None
    task = lab.exp.task
    harm_I = torch.tensor([float(not task.is_benign(item)) for item in lab.splits.train])
    if float(harm_I.min()) == float(harm_I.max()):
        kind = "harmful" if float(harm_I[0]) else "benign"
        raise UserError(
            f"warmup.contrast=benign: all {len(harm_I)} training items of task={task.name} are "
            f"{kind} (task.groups={task.groups}), so there is nothing to set them against; draw "
            "items of both kinds, or set warmup.contrast=reward"
        )
    return harm_I
