"""Tasks whose answer is one of a few options in words."""

from __future__ import annotations

from dataclasses import dataclass

from crl_exp.tasks.base import Task


@dataclass
class ChoiceTask(Task):
    """Base of these. With `choices` the output is restricted to the options.

    length_normalised: an option of several tokens is scored by the sum of their log-probabilities;
        true: by their mean, so that long options aren't at a disadvantage.
    choice_prefix: stands before each option where the output is restricted; " " for a plain prompt
        that ends in a word or a colon, behind which most models begin an answer with a space.
    """

    length_normalised: bool
    choice_prefix: str

    def faults(self) -> list[str]:
        found = super().faults()
        if self.choices is None:
            found += [
                f"task.{name}={value!r}: does nothing with task.choices=null"
                for name, value in (
                    ("length_normalised", self.length_normalised),
                    ("choice_prefix", self.choice_prefix),
                )
                if value
            ]
        return found

    @property
    def constrained_to(self) -> list[str] | None:
        if self.choices is None:
            return None
        return [self.choice_prefix + choice for choice in self.choices]

    @property
    def by_length(self) -> bool:
        return self.length_normalised
