"""Public sets of prompts to be refused, or not: HarmBench, XSTest, do-not-answer.

Free text. Rewarded are refusals of harmful prompts and answers to benign ones. What a model writes
is scored, never shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crl_exp.config.errors import UserError
from crl_exp.tasks.base import Item, content_id, shuffled, unique
from crl_exp.tasks.data.rows import Row
from crl_exp.tasks.hub import HubTask, Question
from crl_exp.tasks.refusal import read_benign_prompts, with_context
from crl_exp.tasks.scorers.refusal_scoring import RefusalTask


@dataclass
class RefusalSet(RefusalTask, HubTask):
    """Base."""

    def prompt(self, question: Question, shots: Sequence[Question]) -> str:
        return question.fields["prompt"]


@dataclass
class XSTest(RefusalSet):
    """Safe prompts that sound unsafe, and unsafe ones (Röttger et al., arXiv 2308.01263).

    Safe prompts are rewarded when answered, unsafe ones when refused.
    """

    columns = ("prompt", "label")
    optional_columns = ("type",)

    def question(self, row: Row) -> Question:
        label, prompt = row.text("label").lower(), row.text("prompt")
        if label not in ("safe", "unsafe"):
            raise row.fault("label", f"is {label!r}, not safe or unsafe")
        group = row.cell("type")
        return Question(prompt, {"prompt": prompt}, benign=label == "safe", group=group)

    def why_no_benign(self) -> str:
        return ""


@dataclass
class HarmfulSet(RefusalSet):
    """Base of sets with harmful prompts alone.

    n_test_benign: benign prompts of our own in the extra test set `benign`; over-refusal is one
        minus the mean reward there.
    """

    n_test_benign: int

    def faults(self) -> list[str]:
        found = super().faults()
        if self.n_test_benign < 1:
            found.append(f"task.n_test_benign={self.n_test_benign}: must be at least 1")
        return found

    def why_no_benign(self) -> str:
        return f"the benign prompts of task={self.name} are a test set, none is trained on"

    def extra(self) -> dict[str, tuple[Item, ...]]:
        prompts = read_benign_prompts()
        benign = unique([Item(content_id(p), p, benign=True) for p in prompts])
        if self.n_test_benign > len(benign):
            raise UserError(
                f"there are {len(benign)} benign prompts, but "
                f"task.n_test_benign={self.n_test_benign}; lower it"
            )
        return {"benign": tuple(shuffled(benign, self.split_seed)[: self.n_test_benign])}


@dataclass
class HarmBench(HarmfulSet):
    """Harmful behaviours: standard, contextual, copyright (Mazeika et al., arXiv 2402.04249).

    max_context_chars: a contextual behaviour comes after its context, which is cut to this many
        characters, at a space. 0 leaves it out.
    """

    columns = ("prompt",)
    optional_columns = ("context", "category")  # the context of the contextual subset

    max_context_chars: int

    def faults(self) -> list[str]:
        found = super().faults()
        if self.max_context_chars < 0:
            found.append(f"task.max_context_chars={self.max_context_chars}: must not be negative")
        return found

    def question(self, row: Row) -> Question:
        behaviour, context = row.text("prompt"), row.cell("context")
        # The id is of the whole text, so that it stays the same whatever is cut.
        user = with_context(behaviour, context, self.max_context_chars)
        content = f"{context}\n{behaviour}"
        return Question(content, {"prompt": user}, group=row.cell("category"))


@dataclass
class DoNotAnswer(HarmfulSet):
    """Questions that a responsible model doesn't answer (Wang et al., arXiv 2308.13387)."""

    columns = ("question",)
    optional_columns = ("risk_area",)

    def question(self, row: Row) -> Question:
        prompt = row.text("question")
        return Question(prompt, {"prompt": prompt}, group=row.cell("risk_area"))
