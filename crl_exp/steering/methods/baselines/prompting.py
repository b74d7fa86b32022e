"""Other words: what a better question, and a few examples, would have brought."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Unsteered
from crl_exp.generation.engine import Prompts
from crl_exp.generation.results import Generation
from crl_exp.steering.answerer import Answerer
from crl_exp.steering.methods.base import WithoutLayers
from crl_exp.steering.methods.baselines.demonstrations import (
    Demonstration,
    demonstrations,
    in_turns,
)
from crl_exp.steering.workspace import SteeringConfig, Workspace
from crl_exp.tasks.base import Item
from crl_exp.tasks.few_shot import fill

OPTIONS = "{choices}"
Turns = tuple[Sequence[tuple[str, str]], str]
"""Earlier user turns with their answers, and the user turn that is to be answered."""


class OtherWords(Answerer):
    """The unsteered model, asked in other words, after examples.

    wording: `{user}` stands for the task's own prompt, `{choices}` for its options. examples: in
    the order in which they are taken; n_shots of them come first.
    """

    def __init__(
        self, wording: str, choices: Sequence[str], examples: Sequence[Demonstration], n_shots: int
    ):
        self.wording, self.choices = wording, list(choices)
        self.examples, self.n_shots = list(examples), n_shots
        self.read: tuple[str, Prompts] | None = None  # of the split that was asked about last

    def ready(self, workspace: Workspace, split: str) -> None:
        if self.read is not None and self.read[0] == split:
            return
        self.read = None  # its memory is free before the next is read
        ids = [self.ids(workspace, item) for item in workspace.splits.named()[split]]
        self.read = split, workspace.read(split, ids)

    def ids(self, workspace: Workspace, item: Item) -> list[int]:
        before, user = self.turns(item)
        return workspace.lm.prompt_ids(user, workspace.exp.task.chat_template, before)

    def generation(
        self,
        workspace: Workspace,
        split: str,
        items: Sequence[int],
        record: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Generation:
        self.ready(workspace, split)
        assert self.read is not None
        return workspace.generated(Unsteered(), self.read[1], items, record, advance)

    def turns(self, item: Item) -> Turns:
        """The examples' turns and the item's own. No example asks what the item asks."""
        others = (one for one in self.examples if one.user != item.user)
        before = [one for _, one in zip(range(self.n_shots), others, strict=False)]
        return tuple((self._worded(o.user), o.answer) for o in before), self._worded(item.user)

    def _worded(self, user: str) -> str:
        return fill(self.wording, {"user": user, "choices": listed(self.choices)})


@dataclass
class Prompting(WithoutLayers):
    """Baseline: no steering, other wordings and examples in context; the best pair on validation.

    wordings: `{user}` stands for the task's own prompt and `{choices}` for its options, "Positive
        or Negative"; a wording with `{choices}` is left out where the task has none, which the
        result's notes say.
    shots: numbers of examples: training items with their right answer (in free text, with the
        model's own answer where it was rewarded), drawn by `seed`, options taking turns. With a
        chat template they are turns before the item's, else texts.
    Each pair whose prompts the model has room for is tried; of equals the first in the order of the
    lists is taken.
    """

    label: ClassVar[str] = "prompting"

    wordings: list[str]
    shots: list[int]

    @property
    def uses_seed(self) -> bool:
        return any(self.shots)

    def faults(self) -> list[str]:
        found = [
            f"method.wordings: {wording!r} must hold {{user}}, the task's own prompt"
            for wording in self.wordings
            if "{user}" not in wording
        ]
        if not self.wordings:
            found.append("method.wordings is empty; give one at least, e.g. ['{user}']")
        if not self.shots or min(self.shots) < 0:
            found.append(f"method.shots={self.shots}: must hold numbers from 0 up, e.g. [0,4]")
        return found

    def conflicts(self, exp: SteeringConfig) -> list[str]:
        if self.usable(exp):
            return []
        return [
            f"method.wordings: all hold {OPTIONS}, and task={exp.task.name} has no options; add "
            "one without, e.g. '{user}'"
        ]

    @property
    def nothing_instead(self) -> str:
        own = "{user}" in self.wordings and 0 in self.shots
        return (
            ""
            if own
            else (
                "with '{user}' in method.wordings and 0 in method.shots the task's own prompt stays"
            )
        )

    def usable(self, exp: SteeringConfig) -> list[str]:
        return [word for word in self.wordings if exp.task.choices or OPTIONS not in word]

    def prepare(self, workspace: Workspace) -> OtherWords:
        examples = self._examples(workspace)
        if left_out := [w for w in self.wordings if w not in self.usable(workspace.exp)]:
            workspace.note("wordings left out, as the task has no options", left_out)
        asked = [
            OtherWords(wording, workspace.exp.task.choices or [], examples, n)
            for wording in self.usable(workspace.exp)
            for n in self.shots
        ]
        asked = _those_that_fit(workspace, asked)
        rewards = []
        with workspace.bar("trying wordings", len(asked)) as advance:
            for one in asked:
                rewards.append(workspace.validation_reward(one))
                one.read = None
                advance(1)
        best = asked[rewards.index(max(rewards))]
        workspace.note(
            "validation_reward_by_wording",
            [[one.wording, one.n_shots, r] for one, r in zip(asked, rewards, strict=True)],
        )
        workspace.note("wording", best.wording)
        workspace.note("n_shots", best.n_shots)
        shown = best.turns(workspace.splits.test[0])[0]
        workspace.note("examples", [list(pair) for pair in shown])
        return best

    def _examples(self, workspace: Workspace) -> list[Demonstration]:
        """One more than are shown, as an item's own question is passed over."""
        most = max(self.shots)
        if not most:
            return []
        found = in_turns(demonstrations(workspace), workspace.exp.seed)
        if len(found) < most:
            raise UserError(
                f"method.shots={self.shots}: only {len(found)} training items have a right answer "
                "to show; lower it, or raise task.n_train"
            )
        return found[: most + 1]


def _those_that_fit(workspace: Workspace, asked: list[OtherWords]) -> list[OtherWords]:
    """Those whose every prompt leaves room for the answer; warns of the others.

    Raises `UserError` where there are none.
    """
    limit, task = workspace.lm.max_positions, workspace.exp.task
    if limit is None:
        return asked
    kept, most = [], limit - task.max_new_tokens
    items = [
        item for name, part in workspace.splits.named().items() if name != "train" for item in part
    ]
    for one in asked:
        longest = max(len(one.ids(workspace, item)) for item in items)
        if longest <= most:
            kept.append(one)
            continue
        workspace.warn(
            f"{one.n_shots} examples with the wording {one.wording!r} make prompts of {longest} "
            f"tokens, and {workspace.lm.name} takes {limit}: not tried"
        )
    if not kept:
        raise UserError("method=prompting: no wording leaves room for an answer; add 0 to shots")
    return kept


def listed(choices: Sequence[str]) -> str:
    """ "a", "a or b", "a, b or c"."""
    *first, last = choices or [""]
    return f"{', '.join(first)} or {last}" if first else last
