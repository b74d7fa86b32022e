"""Answers restricted to a few options: the options' tokens, and which of them an answer is.

Where every option is one token, the answer is the one with the highest logit at the last prompt
token. Else each option is scored by the log-probability of all its tokens, log p(option | prompt) =
Σ_t log p(token_t | prompt, token_<t), by `length_normalised` over their number. Shapes: B rows, O
options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from crl_exp.config.errors import UserError


@dataclass(frozen=True)
class Options:
    """Token ids of each option. length_normalised: scores are divided by the number of tokens.

    texts: as the task gives them; none where only the tokens are known.
    """

    ids: tuple[tuple[int, ...], ...]
    length_normalised: bool = False
    texts: tuple[str, ...] = field(default=(), compare=False)

    @property
    def asked(self) -> dict[str, Any]:
        """What of them the model is asked by, for the keys of what is kept."""
        return {"ids": self.ids, "length_normalised": self.length_normalised}

    def texts_of(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """The options that these tokens are, letter by letter: read back by a tokenizer they may
        lose a space, a mark or a special token."""
        text = dict(zip(self.ids, self.texts, strict=True))
        return [text[tuple(tokens)] for tokens in answers]

    @property
    def one_token(self) -> list[int] | None:
        """The options' only tokens, where each has but one."""
        return [ids[0] for ids in self.ids] if self.longest == 1 else None

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))

    @property
    def n_longer(self) -> int:
        """Options of more than one token: so many rows are read on behind each prompt."""
        return sum(len(ids) > 1 for ids in self.ids)


def options_of(
    tokenizer: Any, texts: Sequence[str], length_normalised: bool, model: str
) -> Options:
    """The options' tokens, as an answer begins with them.

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
        if not length_normalised and b_ids[: len(a_ids)] == a_ids:
            raise UserError(
                f"task.choices: {b!r} begins with all tokens of {a!r}, so it can never be more "
                "likely; set task.length_normalised=true, which compares options by token, or "
                "reword one"
            )
    return Options(ids, length_normalised, tuple(texts))


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
