"""Answers restricted to a few options: the options' tokens, and which of them an answer is.

Where every option is one token, the answer is the one with the highest logit at the last prompt
token. Else each option is scored by the log-probability of all its tokens, log p(option | prompt) =
Σ_t log p(token_t | prompt, token_<t), by `length_normalised` over their number, by `divisors` over
numbers of the task's. The options are the same for all items of a task, or each item has its own.
Shapes: B rows, O options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from crl_exp.config.errors import UserError
from crl_exp.config.files import content_key


@dataclass(frozen=True)
class Options:
    """Token ids of each option. length_normalised: scores are divided by the number of tokens.

    texts: as the task gives them; none where only the tokens are known. divisors: what each score
    is divided by in its place; none where the task gives none.
    """

    ids: tuple[tuple[int, ...], ...]
    length_normalised: bool = False
    texts: tuple[str, ...] = field(default=(), compare=False)
    divisors: tuple[int, ...] = ()

    @property
    def asked(self) -> dict[str, Any]:
        """What of them the model is asked by, for the keys of what is kept."""
        found = {"ids": self.ids, "length_normalised": self.length_normalised}
        return {**found, "divisors": self.divisors} if self.divisors else found

    def texts_of(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """The options that these tokens are, letter by letter: read back by a tokenizer they may
        lose a space, a mark or a special token."""
        text: dict[tuple[int, ...], str] = {}
        for ids, own in zip(self.ids, self.texts, strict=True):
            text.setdefault(ids, own)  # of two that are the same tokens the first is taken
        return [text[tuple(tokens)] for tokens in answers]

    @property
    def over(self) -> tuple[int, ...]:
        """What each option's summed log-probability is divided by."""
        if self.divisors:
            return self.divisors
        return tuple(len(ids) if self.length_normalised else 1 for ids in self.ids)

    @property
    def one_token(self) -> list[int] | None:
        """The options' only tokens, where each has but one and the likeliest is taken."""
        alike = self.longest == 1 and len(set(self.over)) == 1
        return [ids[0] for ids in self.ids] if alike else None

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))

    @property
    def n_longer(self) -> int:
        """Options of more than one token: so many rows are read on behind each prompt."""
        return sum(len(ids) > 1 for ids in self.ids)


@dataclass(frozen=True)
class ItemOptions:
    """Options that are other ones for each item: those of each, by split, in the items' order."""

    of: Mapping[str, tuple[Options, ...]] = field(compare=False)
    asked: str  # hash of what of all of them the model is asked by
    longest: int
    n_longer: int
    one_token: None = None

    @classmethod
    def made(cls, of: Mapping[str, tuple[Options, ...]]) -> ItemOptions:
        every = [options for part in of.values() for options in part]
        asked = content_key({name: [[o.ids, o.over] for o in part] for name, part in of.items()})
        longest = max(options.longest for options in every)
        return cls(of, asked, longest, max(options.n_longer for options in every))


def continued(whole: Sequence[int], n_prompt: int, text: str, model: str) -> tuple[int, ...]:
    """Tokens of an option behind its prompt, read together with it: `whole` without the first
    `n_prompt`. Raises `UserError` where none are left."""
    if len(whole) <= n_prompt:
        raise UserError(
            f"the option {text!r} adds no token of {model} to its prompt, so it can't be scored"
        )
    return tuple(whole[n_prompt:])


def options_of(
    tokenizer: Any,
    texts: Sequence[str],
    length_normalised: bool,
    model: str,
    divisors: Sequence[int] | None = None,
) -> Options:
    """The options' tokens, as an answer begins with them.

    divisors: see `Options`; then an option may also begin with all tokens of another.

    Raises `UserError` where two are the same to this tokenizer, or one can never be chosen.
    """
    ids = tuple(tuple(_ids(tokenizer, text)) for text in texts)
    for text, own in zip(texts, ids, strict=True):
        if not own:
            raise UserError(f"task.choices: {text!r} is no token at all for {model}; reword it")
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in own:
            raise UserError(
                f"task.choices: {model} has no tokens for {text!r} (it reads it as unknown); "
                "choose other words"
            )
    for (a, a_ids), (b, b_ids) in permutations(zip(texts, ids, strict=True), 2):
        if a_ids == b_ids:
            raise UserError(
                f"task.choices: {a!r} and {b!r} are the same tokens of {model}; reword one"
            )
        if divisors is None and not length_normalised and b_ids[: len(a_ids)] == a_ids:
            raise UserError(
                f"task.choices: {b!r} begins with all tokens of {a!r}, so it can never be more "
                "likely; set task.length_normalised=true, which compares options by token, or "
                "reword one"
            )
    return Options(ids, length_normalised, tuple(texts), tuple(divisors or ()))


def _ids(tokenizer: Any, text: str) -> list[int]:
    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    alone = plain(text)
    if not text.startswith(" "):
        return alone
    # Sentencepiece writes a space before any text by itself (Llama-2, Mistral v0.1): one that is
    # there already would be a second. Behind another token it is written once.
    anchor, behind = plain(ANCHOR), plain(ANCHOR + text)
    tail = behind[len(anchor) :]
    marked = behind[: len(anchor)] == anchor and tail == plain(text[1:])
    return tail if marked else alone


ANCHOR = ":"
"""A text that no tokenizer joins with the space behind it."""


def written_apart(tokenizer: Any, text: str) -> bool:
    """Whether " text" is other tokens than "text": the tokenizer doesn't write the space itself."""
    return not text.startswith(" ") and _ids(tokenizer, " " + text) != _ids(tokenizer, text)
