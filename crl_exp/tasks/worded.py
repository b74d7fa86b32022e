"""Tasks whose question can be worded in several ways: the wording is an axis of a sweep."""

from __future__ import annotations

from dataclasses import dataclass

from crl_exp.errors import did_you_mean
from crl_exp.tasks.base import Item, Task, content_id


@dataclass
class Worded(Task):
    """Base.

    question: the user turn, `{text}` stands for the item's text. It comes last, so that all prompts
        share one long prefix, which is read once. By default the one of `wordings` that `wording`
        names; given itself, it holds.
    wording: its name, by which reports set prompts side by side.
    wordings: questions by name. Another one: `+task.wordings.mine="…"` with task.wording=mine.
    """

    question: str
    wording: str
    wordings: dict[str, str]

    def faults(self) -> list[str]:
        found = super().faults()
        if self.wordings and self.wording not in self.wordings:
            return [
                *found,
                f"task.wording={self.wording}: must be one of {', '.join(self.wordings)}, or be "
                f"added by '+task.wordings.{self.wording}=…'"
                f"{did_you_mean(self.wording, self.wordings)}",
            ]
        if "{text}" not in self.question:
            found.append(f"task.question={self.question!r}: must hold {{text}}, the item's text")
        return found

    def asked(self, text: str, target: str | None = None) -> Item:
        """The item of a text. Its id is of the text alone: another wording keeps the splits."""
        return Item(content_id(text), self.question.replace("{text}", text), target=target)
