"""Quality beside reward: how likely the unsteered model finds an answer of free text.

A reward may be got by text that no longer is one. The log-likelihood under the unsteered model,
teacher-forced behind the item's own prompt, says how far from its own language an answer is: no
judge is needed, and one pass over kept prompts does it. Per token, the answer's own end included,
so that long and short answers compare. Shapes: B rows, T positions, I items.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from crl_exp.config.kept import shared
from crl_exp.experiments.workspace import RunWorkspace
from crl_exp.generation import teacher_forcing
from crl_exp.runs import preemption
from crl_exp.steering.answers import Answers

NAME = "log_likelihood"


class Quality(NamedTuple):
    """figures: for the result. was_I, now_I: of each item's unsteered and steered answer, float64,
    in nats a token; None where nothing is read."""

    figures: dict[str, Any]
    was_I: Tensor | None = None
    now_I: Tensor | None = None


def quality(workspace: RunWorkspace, split: str, steered: Answers, changed: Tensor) -> Quality:
    """`log_likelihood_baseline`, `…_steered`, `…_delta` and `…_delta_ci95`, in nats a token: means
    over items of each answer's mean. Null where the output is restricted to options, and on
    validation, where nothing is chosen by it.

    changed: which answers differ from the unsteered ones [I]; the others aren't read again.
    The interval is the paired normal one, Δ ± 1.96·sd/√n over items.
    """
    keys = [f"{NAME}_{what}" for what in ("baseline", "steered", "delta", "delta_ci95")]
    if workspace.options is not None or split == "validation":
        return Quality(dict.fromkeys(keys))
    key = [*workspace.depends_on(split), split]
    baseline = workspace.baseline(split)
    was_I = shared(NAME, key, lambda: log_likelihood(workspace, split, baseline), keep=16)
    items = changed.nonzero()[:, 0].tolist()
    now_I = was_I.clone()
    if items:
        now_I[items] = log_likelihood(workspace, split, steered, items)
    delta_I = now_I - was_I
    mean, half = float(delta_I.mean()), 0.0
    if len(delta_I) > 1:
        half = 1.959964 * float(delta_I.std()) / len(delta_I) ** 0.5
    values = [float(was_I.mean()), float(now_I.mean()), mean, [mean - half, mean + half]]
    return Quality(dict(zip(keys, values, strict=True)), was_I, now_I)


@torch.no_grad()
def log_likelihood(
    workspace: RunWorkspace, split: str, answers: Answers, items: list[int] | None = None
) -> Tensor:
    """Mean log-probability of each answer's tokens under the unsteered model [I], float64, nats.

    items: positions in the split; all by default.
    """
    lm, task, prompts = workspace.lm, workspace.exp.task, workspace.prompts(split)
    given = teacher_forcing.forced(lm, answers.generation, task.max_new_tokens, task.stop_strings)
    chosen = range(len(given)) if items is None else items
    # Like with like: rows of a batch are padded to the longest.
    order = sorted(chosen, key=lambda i: (given[i].n_scored, len(prompts.prompts[i]), i))
    mean_I = torch.zeros(len(given), dtype=torch.float64)
    longest = max(given[i].n_scored for i in order)
    a_row = teacher_forcing.bytes_a_row(
        lm, max(len(prompts.prompts[i]) for i in order), longest, backward=False
    )
    fit = workspace.engine.batch_size.rows(a_row, lm.devices)
    size = min(fit, workspace.exp.engine.items_together)
    with workspace.bar(f"log-likelihood on {split}", len(order)) as advance:

        def play(rows: list[int]) -> None:
            preemption.check()
            forced = [given[i] for i in rows]
            logits_BTV = teacher_forcing.logits(lm, prompts.batch(rows), forced)
            total_B = teacher_forcing.log_probs(lm, logits_BTV, forced).double().sum(1).cpu()
            mean_I[rows] = total_B / torch.tensor([answer.n_scored for answer in forced])
            advance(len(rows))

        starts = range(0, len(order), size)
        workspace.engine.batch_size.play([order[at : at + size] for at in starts], play)
    return mean_I if items is None else mean_I[items]
