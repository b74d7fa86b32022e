"""A bias on the answer: the cheapest explanation of a vector that is the same at every prompt.

Shapes: N items, B rows, O options, X candidates for the next token, M biases, E edges, I intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Controller, StepContext
from crl_exp.models.language_model import LanguageModel
from crl_exp.steering.kept_run import KeptRun
from crl_exp.steering.methods.base import WithoutLayers
from crl_exp.steering.methods.baselines.options import option_rewards, option_scores
from crl_exp.steering.workspace import SteeringConfig, Workspace

KEPT = 400
END = "<end>"
"""Among `tokens`: whatever ends an answer of this model."""


class OutputBias(Controller):
    """Adds a constant to the scores of some candidates, at every token that is chosen.

    bias: by position among the candidates, in nats: the options in their order, where the answer is
        restricted to options, or else token ids. An option counts once, however long it is.
    """

    at_output = True

    def __init__(self, bias: dict[int, float]):
        super().__init__()
        self.bias = bias

    def weigh(self, score_BX: Tensor, context: StepContext) -> Tensor:
        bias_X = torch.zeros(score_BX.shape[1], dtype=score_BX.dtype)
        for candidate, bias in self.bias.items():
            bias_X[candidate] = bias
        return score_BX + bias_X.to(score_BX.device)


@dataclass
class Calibration(WithoutLayers):
    """Baseline: a bias on the answer, nothing else (Zhao et al., arXiv 2102.09690, with labels).

    With options, one bias for each but the first, that makes the mean reward on `chosen_on` the
    highest: found exactly, option by option, until none brings more; of equals the smallest.
    In free text one bias for all of `tokens`, the best of `grid` on validation, or none.

    tokens: texts that are one token each; `<end>` stands for whatever ends an answer. Free text
        only.
    grid: biases tried there, in nats; 0 is always tried too.
    chosen_on: validation or train, for options.
    """

    label: ClassVar[str] = "bias on the answer"

    tokens: list[str] | None
    grid: list[float]
    chosen_on: str

    def faults(self) -> list[str]:
        found = []
        if not self.grid or not all(math.isfinite(bias) for bias in self.grid):
            found.append(f"method.grid={self.grid}: must hold finite numbers")
        if self.chosen_on not in ("validation", "train"):
            found.append(f"method.chosen_on={self.chosen_on}: must be validation or train")
        return found

    def conflicts(self, exp: SteeringConfig) -> list[str]:
        if exp.task.choices:
            on = self.tokens is not None
            return [
                f"method.tokens={self.tokens} is for free text, and task={exp.task.name} has "
                "options, which the bias is between; set method.tokens=null"
            ] if on else []  # fmt: skip
        if exp.task.options_by_item:
            why = exp.task.why_no_options()
            return [f"method=calibration chooses a bias between options, and {why}"]
        found = []
        if not self.tokens:
            found.append(
                f"task={exp.task.name} is answered in free text: name the tokens whose bias is "
                f'chosen, e.g. \'method.tokens=["{END}","."]\' ({END}: what ends an answer)'
            )
        if exp.engine.decode == "compiled":
            found.append("method=calibration can't be compiled; set engine.decode=eager")
        return found

    @property
    def nothing_instead(self) -> str:
        on_train = self.chosen_on == "train"
        return "method.chosen_on=validation leaves out what does harm there" if on_train else ""

    def prepare(self, workspace: Workspace) -> OutputBias:
        return self._of_options(workspace) if workspace.options else self._of_tokens(workspace)

    def restored(self, kept: KeptRun) -> OutputBias:
        choices = kept.exp.task.choices
        if choices:
            biases = kept.notes[self._of_each]
            return OutputBias({i: biases[choice] for i, choice in enumerate(choices)})
        bias = float(kept.notes[self._of_all])
        return OutputBias(dict.fromkeys(self._ids(kept.lm), bias))

    @property
    def _of_each(self) -> str:
        """What the notes of a result call the biases of the options."""
        return f"bias of each option, chosen on {self.chosen_on}"

    @property
    def _of_all(self) -> str:
        """What they call the one of all tokens."""
        return f"bias of {self.tokens}"

    def _ids(self, lm: LanguageModel) -> list[int]:
        return sorted({i for text in self.tokens or [] for i in token_ids(lm, text)})

    def _of_options(self, workspace: Workspace) -> OutputBias:
        split = self.chosen_on
        score_NO, reward_NO = option_scores(workspace, split), option_rewards(workspace, split)
        bias_O = best_bias(score_NO, reward_NO)
        for reward_N in tried_rewards(score_NO, reward_NO, bias_O):
            workspace.tried.add(reward_N.numpy(), "biases between the options", split)
        named = zip(workspace.exp.task.choices or [], bias_O.tolist(), strict=True)
        workspace.note(self._of_each, dict(named))
        return OutputBias(dict(enumerate(bias_O.tolist())))

    def _of_tokens(self, workspace: Workspace) -> OutputBias:
        ids = self._ids(workspace.lm)
        tried = []
        grid = sorted({0.0, *self.grid}, key=lambda bias: (abs(bias), bias))
        with workspace.bar("trying biases", len(grid)) as advance:
            for bias in grid:
                made = OutputBias(dict.fromkeys(ids, bias))
                tried.append((workspace.validation_reward(made), made, bias))
                advance(1)
        _, best, bias = max(tried, key=lambda t: t[0])
        workspace.note("validation_reward_by_bias", {str(b): reward for reward, _, b in tried})
        workspace.note(self._of_all, bias)
        return best


def token_ids(lm: LanguageModel, text: str) -> list[int]:
    """Ids of the token that a text is. Raises `UserError` where it is none or several."""
    if text == END:
        return sorted(lm.eos_ids)
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    unknown = ids == [lm.tokenizer.unk_token_id]
    if len(ids) != 1 or unknown:
        what = "unknown" if unknown else f"{len(ids)} tokens"
        raise UserError(
            f"method.tokens: {text!r} is {what} to {lm.name}; name texts of one token "
            f"(a leading space counts), or {END} for what ends an answer"
        )
    return ids


def best_bias(score_NO: Tensor, reward_NO: Tensor) -> Tensor:
    """Biases [O] added to the scores that make the mean reward of the highest ones the highest.

    Exact in each option while the others stay, repeated until none brings more; with two options
    that is the best there is. The first option's is 0; of equals the nearest to 0 is taken.
    """
    bias_O = torch.zeros(score_NO.shape[1], dtype=torch.float64)
    best, improved = _mean_reward(score_NO, reward_NO, bias_O), True
    while improved:
        improved = False
        for option in range(1, len(bias_O)):
            tried_O = bias_O.clone()
            tried_O[option] = _best_alone(score_NO + bias_O, reward_NO, option) + bias_O[option]
            reward = _mean_reward(score_NO, reward_NO, tried_O)
            if reward > best + 1e-12:
                bias_O, best, improved = tried_O, reward, True
    return bias_O


def tried_rewards(score_NO: Tensor, reward_NO: Tensor, bias_O: Tensor) -> Tensor:
    """What each item gets [M, N] at every bias of one option, the others' as they were chosen.

    Of more than `KEPT` that answer differently so many are taken, evenly: neighbours differ in an
    item or two.
    """
    found = []
    for option in range(1, len(bias_O)):
        rival_N, margin_N = _rivals(score_NO + bias_O, option)
        edge_E = margin_N.unique()
        at_I = torch.cat([edge_E[:1] - 1, (edge_E[1:] + edge_E[:-1]) / 2, edge_E[-1:] + 1])
        kept_M = torch.linspace(0, len(at_I) - 1, min(KEPT, len(at_I))).round().long()
        taken_MN = at_I[kept_M][:, None] > margin_N
        other_N = reward_NO.gather(1, rival_N[:, None])[:, 0]
        found.append(torch.where(taken_MN, reward_NO[:, option], other_N))
    return torch.cat(found)


def _mean_reward(score_NO: Tensor, reward_NO: Tensor, bias_O: Tensor) -> float:
    taken_N = (score_NO + bias_O).argmax(dim=1)
    return float(reward_NO.gather(1, taken_N[:, None]).mean())


def _best_alone(score_NO: Tensor, reward_NO: Tensor, option: int) -> float:
    """What is best added to one option's scores: an item takes it once that exceeds its margin."""
    rival_N, margin_N = _rivals(score_NO, option)
    gain_N = reward_NO[:, option] - reward_NO.gather(1, rival_N[:, None])[:, 0]
    edge_E, group_N = margin_N.unique(return_inverse=True)
    gain_E = torch.zeros(len(edge_E), dtype=torch.float64).index_add_(0, group_N, gain_N.double())
    total_I = torch.cat([gain_E.new_zeros(1), gain_E.cumsum(0)])  # of the intervals between edges
    low_I = torch.cat([edge_E[:1] - 2, edge_E])
    high_I = torch.cat([edge_E, edge_E[-1:] + 2])
    # The middle of each interval, farthest from what rounding could turn; 0 where 0 lies in it.
    at_I = torch.where((low_I < 0) & (high_I > 0), 0.0, (low_I + high_I) / 2)
    best_I = (total_I >= total_I.max() - 1e-12).nonzero()[:, 0]
    return float(at_I[best_I][at_I[best_I].abs().argmin()])


def _rivals(score_NO: Tensor, option: int) -> tuple[Tensor, Tensor]:
    """Of each item the best other option [N], and by how much that is ahead of this one [N]."""
    others_NO = score_NO.clone()
    others_NO[:, option] = -torch.inf
    rival_N = others_NO.max(dim=1)
    return rival_N.indices, rival_N.values - score_NO[:, option]
