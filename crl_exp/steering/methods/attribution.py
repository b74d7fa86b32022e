"""Attribution: what adding a feature will do, predicted for all features by one gradient.

Stage 1's r says what goes with being right; the gradient of what is rewarded says what adding a
vector changes. To first order a coefficient c_j on feature j raises the objective by
c_j · W_dec[j]·ḡ nats an item, ḡ being the mean gradient by a vector added at every steered token.
Scores compare across layers as they are (attribution patching: Nanda 2023; Syed et al., arXiv
2310.10348; for the choice of SAE features to steer by: arXiv 2505.23556).
Shapes: S sites (index 0 is the input of layer 0), D d_model, F d_sae, B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.kept import shared
from crl_exp.generation import teacher_forcing
from crl_exp.generation.prompts import PromptBatch
from crl_exp.generation.teacher_forcing import Forced
from crl_exp.models.choice import ItemOptions, Options
from crl_exp.runs import preemption
from crl_exp.steering.controllers.fixed import Steer
from crl_exp.steering.feature_statistics.scores import handle_negative
from crl_exp.steering.methods.baselines.options import right_options
from crl_exp.steering.methods.corrsteer import CorrSteerS
from crl_exp.steering.workspace import SteeringConfig, Workspace

OBJECTIVES = ("auto", "target", "reward")


@dataclass
class Attribution(CorrSteerS):
    """The one feature of all layers whose addition, by the gradient, raises the objective most.

    objective: `target`, the mean log-likelihood of the items' targets among the options;
        `reward`, the derivative of the mean reward by the policy gradient (REINFORCE, Williams
        1992) at the unsteered answers: Σ (reward − its mean) · log p(answer); `auto`, target where
        the output is restricted to options, else reward.
    """

    label = "attribution"
    variant_of = ""  # it shares how a layer is chosen, not what is published

    objective: str

    def faults(self) -> list[str]:
        ok = self.objective in OBJECTIVES
        near = did_you_mean(self.objective, OBJECTIVES)
        fault = f"method.objective={self.objective}: must be one of {', '.join(OBJECTIVES)}{near}"
        return [*super().faults(), "" if ok else fault]

    def conflicts(self, exp: SteeringConfig) -> list[str]:
        if self.objective != "target" or exp.task.choices or exp.task.options_by_item:
            return super().conflicts(exp)
        return [
            *super().conflicts(exp),
            "method.objective=target needs an output that is restricted to options (task.choices); "
            "for free text set method.objective=reward",
        ]

    def select(self, workspace: Workspace) -> list[Steer]:
        best = ranked(workspace, self.objective)[: self.n_candidates]
        chosen = self.pick(workspace, [steer for steer, _ in best])
        workspace.note(
            "attribution",
            [
                {"layer": s.layer, "feature": s.feature_idx, "coefficient": s.coefficient,
                 "predicted_nats": score, "chosen": s is chosen}
                for s, score in best
            ],
        )  # fmt: skip
        return self.scaled(workspace, [chosen])[0]


def ranked(workspace: Workspace, objective: str) -> list[tuple[Steer, float]]:
    """All allowed features of its layers with their coefficients and scores, best first.

    The sign of `warmup.negative=steer` is the score's: a feature that lowers the objective is then
    taken away, by the coefficient for what is steered against, and its score is that of taking it
    away. Raises `UserError` where no feature may be steered.
    """
    gradient_SD = mean_gradient(workspace, objective)
    found: list[tuple[Steer, float]] = []
    for layer, statistics in workspace.statistics().items():
        sae, allowed_C = (
            workspace.saes[layer],
            statistics.allowed(workspace.exp.warmup.min_frequency),
        )
        coefficient_F = workspace.exp.coefficient.values(statistics, sae)
        score_F = scores(gradient_SD[sae.site + 1], sae.W_dec_FD, coefficient_F)
        if workspace.exp.warmup.negative == "steer":
            size_F = workspace.exp.coefficient.values(statistics, sae, against=True).abs()
            lowers_F = score_F.to(coefficient_F.device) < 0
            against_F = torch.where(coefficient_F < 0, size_F, -size_F)
            coefficient_F = torch.where(lowers_F, against_F, coefficient_F)
            score_F = scores(gradient_SD[sae.site + 1], sae.W_dec_FD, coefficient_F)
            workspace.signed_by_method[layer] = coefficient_F
        score_F = handle_negative(score_F, workspace.exp.warmup.negative)
        for feature in allowed_C.tolist():
            steer = Steer(layer, feature, float(coefficient_F[feature]))
            found.append((steer, float(score_F[feature])))
    if not found:
        raise UserError(
            f"layers {sorted(workspace.saes)}: no feature is active in "
            f"{workspace.exp.warmup.min_frequency:.0%} of the answers; lower warmup.min_frequency"
        )
    return sorted(found, key=lambda pair: pair[1], reverse=True)


def scores(gradient_D: Tensor, W_dec_FD: Tensor, coefficient_F: Tensor) -> Tensor:
    """c_j · W_dec[j]·ḡ [F], float64 on the CPU: the predicted change of the objective."""
    along_F = W_dec_FD @ gradient_D.to(W_dec_FD)
    return (coefficient_F.to(along_F) * along_F).double().cpu()


def mean_gradient(workspace: Workspace, objective: str) -> Tensor:
    """ḡ [S, D] over the training items, float64 on the CPU, at every site in one pass.

    Made once a process for runs that ask the same of the same model.
    """
    if objective == "auto":
        objective = "target" if workspace.options else "reward"
    key = [*workspace.depends_on("train"), repr(workspace.exp.decay), objective]

    def make() -> Tensor:
        with workspace.engine.alone():
            return (
                _target_gradient(workspace)
                if objective == "target"
                else _reward_gradient(workspace)
            )

    return shared("gradient", key, make, keep=8)


def _target_gradient(workspace: Workspace) -> Tensor:
    """Of the mean log-likelihood of the targets, among the options alone."""
    assert workspace.options is not None
    if isinstance(workspace.options, ItemOptions):
        return _own_target_gradient(workspace, workspace.options.of["train"])
    options, over = [list(ids) for ids in workspace.options.ids], workspace.options.over
    names = [text.strip() for text in workspace.exp.task.constrained_to or []]
    right = []
    for item in workspace.splits.train:
        if item.target is None or item.target.strip() not in names:
            raise UserError(
                f"method.objective=target: item {item.item_id} has the target {item.target!r}, "
                f"which is not among the options {names}; set method.objective=reward"
            )
        right.append(names.index(item.target.strip()))
    # One position tells options of one token apart; longer ones are a row each.
    whole = workspace.options.one_token is None
    per_item = [Forced(o, ended=False) for o in (options if whole else options[:1])]

    def objective(logits_BTV: Tensor, items: Sequence[int], answers: Sequence[Forced]) -> Tensor:
        if whole:
            token_BT = teacher_forcing.log_probs(workspace.lm, logits_BTV, answers)
            score_IO = token_BT.sum(1).view(len(items), len(options))
            score_IO = score_IO / score_IO.new_tensor(over)
        else:
            score_IO = logits_BTV[:, 0, [option[0] for option in options]]
        right_I1 = torch.tensor([[right[item]] for item in items], device=score_IO.device)
        return score_IO.log_softmax(-1).gather(1, right_I1).sum() / len(right)

    return _summed(workspace, [per_item] * len(right), objective)


def _own_target_gradient(workspace: Workspace, options_I: Sequence[Options]) -> Tensor:
    """The same where each item has options of its own: a row each."""
    right = right_options(workspace, "train").tolist()
    per_item = [[Forced(ids, ended=False) for ids in one.ids] for one in options_I]

    def objective(logits_BTV: Tensor, items: Sequence[int], answers: Sequence[Forced]) -> Tensor:
        score_B = teacher_forcing.log_probs(workspace.lm, logits_BTV, answers).sum(1)
        own = score_B.split([len(per_item[item]) for item in items])
        liked = [
            (score_O / score_O.new_tensor(options_I[item].over)).log_softmax(-1)[right[item]]
            for item, score_O in zip(items, own, strict=True)
        ]
        return torch.stack(liked).sum() / len(right)

    return _summed(workspace, per_item, objective)


def _reward_gradient(workspace: Workspace) -> Tensor:
    """Of the mean reward, by the policy gradient at the unsteered answers.

    Raises `UserError` where all of them got the same reward.
    """
    task, answers = workspace.exp.task, workspace.baseline("train")
    reward_I = answers.reward_B.double()
    if float(reward_I.max()) == float(reward_I.min()):
        raise UserError(
            f"the unsteered model gets a reward of {float(reward_I[0]):g} for all {len(reward_I)} "
            "training items, so method=attribution has no answers to tell apart. Use a task of "
            "medium difficulty or more items (task.n_train=…)"
        )
    advantage_I = (reward_I - reward_I.mean()) / len(reward_I)
    given = teacher_forcing.forced(
        workspace.lm, answers.generation, task.max_new_tokens, task.stop_strings
    )

    def objective(logits_BTV: Tensor, items: Sequence[int], answers: Sequence[Forced]) -> Tensor:
        log_prob_BT = teacher_forcing.log_probs(workspace.lm, logits_BTV, answers)
        return (advantage_I[list(items)].to(log_prob_BT) * log_prob_BT.sum(1)).sum()

    return _summed(workspace, [[answer] for answer in given], objective)


def _summed(
    workspace: Workspace,
    answers: Sequence[Sequence[Forced]],
    objective: Callable[[Tensor, Sequence[int], Sequence[Forced]], Tensor],
) -> Tensor:
    """The gradient [S, D] of an objective that is a sum over training items.

    answers: one or several of each item, a row each. objective: of the logits [B, T, V] of some
    items' rows, the items, and the rows' answers.
    """
    lm, prompts = workspace.lm, workspace.prompts("train")
    longest = max(answer.n_scored for rows in answers for answer in rows)
    weight_T = torch.tensor([float(workspace.exp.decay.at(t)) for t in range(longest)])
    order = sorted(range(len(answers)), key=lambda i: (len(prompts.prompts[i]), i))
    a_row = teacher_forcing.bytes_a_row(lm, len(prompts.prompts[order[-1]]), longest, backward=True)
    fit = workspace.engine.batch_size.rows(a_row, lm.devices)
    size = max(1, min(fit, workspace.exp.engine.items_together) // max(map(len, answers)))
    total_SD = torch.zeros(lm.n_layers + 1, lm.d_model, dtype=torch.float64)
    with workspace.bar("gradients", len(order)) as advance:

        def play(items: list[int]) -> None:
            preemption.check()
            rows = [answer for item in items for answer in answers[item]]
            prompt: PromptBatch = prompts.batch([i for i in items for _ in answers[i]])
            found_SD = teacher_forcing.gradients(
                lm, prompt, rows, lambda made: objective(made, items, rows), weight_T
            )
            total_SD.add_(found_SD.double().cpu())
            advance(len(items))

        starts = range(0, len(order), size)
        workspace.engine.batch_size.play([order[at : at + size] for at in starts], play)
    return total_SD
