"""The text that SAEs are trained on: the tasks' training prompts, answers, general snippets.

Nothing that a task validates or tests on is read here: `HeldOut` drops it by its text.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from crl_exp.config.errors import UserError
from crl_exp.config.machine.assets import asset_path
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.prompt_text import common_prefix
from crl_exp.tasks.base import Item, Splits
from crl_exp.tasks.data.files import read_text

HUTTO = "data/hutto_icwsm_2014"
GENERAL_FILES = {
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}


@dataclass
class TextConfig:
    """general_tokens: tokens of plain text from each source (amazon, movies, nyt, tweets).

    neutral_below: movie snippets enter as plain text only with |rating| below this; the others
        are the sentiment task's.
    max_length: tokens of the longest document; longer ones are cut.
    answers: prompts of each chat source that the model answers itself, greedily.
    answer_tokens: length of these answers.
    held_out_share: share of the documents kept for measuring quality.
    """

    general_tokens: dict[str, int]
    neutral_below: float
    max_length: int
    answers: dict[str, int]
    answer_tokens: int
    held_out_share: float
    seed: int


@dataclass(frozen=True)
class Document:
    """Token ids of one text. `n_prompt` is the prompt's length in chat form, 0 for plain text.

    `n_skip` tokens at the start are not trained on: the first token (its norm is an outlier) or,
    in chat form, the template's opening, which is the same in every document.
    """

    source: str
    ids: tuple[int, ...]
    n_prompt: int
    n_skip: int

    @property
    def opening(self) -> tuple[int, ...]:
        """What a chat source's documents share, and need be run only once; () for plain text."""
        return self.ids[: self.n_skip] if self.n_prompt else ()


def normalise(text: str) -> str:
    """Lower case, single spaces: texts equal in this form count as the same text."""
    return " ".join(text.lower().split())


class HeldOut:
    """Everything that tasks validate or test on, to be kept out of the training text."""

    def __init__(self, splits: Iterable[Splits]):
        users = [
            normalise(item.user)
            for split in splits
            for name, items in split.named().items()
            if name != "train"
            for item in items
        ]
        self._users = "\n".join(users)

    def holds(self, text: str) -> bool:
        """True where the text is, or lies within, a held-out item's user turn."""
        return normalise(text) in self._users


def read_snippets(source: str, neutral_below: float) -> list[tuple[str, str]]:
    """(passage id, text) of one file of Hutto & Gilbert 2014 (tab separated).

    Consecutive sentences of one article or review share the passage id.
    """
    path = asset_path(HUTTO) / GENERAL_FILES[source]
    snippets = []
    for line in read_text(path).split("\n"):
        if not line.strip():
            continue
        identifier, rating, text = line.split("\t", 2)
        if source != "movies" or abs(float(rating)) < neutral_below:
            snippets.append((identifier.split("_")[0], text.strip()))
    return snippets


def plain_documents(lm: LanguageModel, config: TextConfig, held_out: HeldOut) -> list[Document]:
    """Passages of each general source, up to its share of tokens."""
    documents = []
    for source, budget in sorted(config.general_tokens.items()):
        if source not in GENERAL_FILES:
            raise UserError(
                f"text.general_tokens.{source}: unknown source; known: {', '.join(GENERAL_FILES)}"
            )
        passages: dict[str, list[str]] = {}
        for passage, text in read_snippets(source, config.neutral_below):
            if not held_out.holds(text):
                passages.setdefault(passage, []).append(text)
        texts = [" ".join(sentences) for sentences in passages.values()]
        random.Random(config.seed).shuffle(texts)
        for text in texts:
            ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
            for at in range(0, len(ids), config.max_length):
                piece = tuple(ids[at : at + config.max_length])
                if budget > 0 and len(piece) > 1:
                    documents.append(Document(source, piece, n_prompt=0, n_skip=1))
                    budget -= len(piece)
    return documents


def chat_documents(
    lm: LanguageModel, source: str, items: Sequence[Item], config: TextConfig, held_out: HeldOut
) -> list[Document]:
    """A task's training prompts in chat form, the opening that they share left out."""
    users = [item.user for item in items if not held_out.holds(item.user)]
    if not users:
        raise UserError(
            f"tasks.{source} has no training prompt that isn't also validated or tested on; "
            f"raise tasks.{source}.n_train"
        )
    prompts = [lm.prompt_ids(user, chat_template=True) for user in users]
    prompts = [p for p in prompts if len(p) <= config.max_length]
    shared = max(common_prefix(prompts), 1)
    return [Document(source, tuple(p), n_prompt=len(p), n_skip=shared) for p in prompts]


@torch.inference_mode()
def with_answers(
    lm: LanguageModel, documents: Sequence[Document], config: TextConfig, progress
) -> list[Document]:
    """Continue the first `config.answers[source]` prompts greedily, up to the end token."""
    answered = list(documents)
    left = dict(config.answers)
    chosen = []
    for index, document in enumerate(documents):
        if left.get(document.source, 0) > 0:
            left[document.source] -= 1
            chosen.append(index)
    chosen.sort(key=lambda i: len(documents[i].ids))
    for at in range(0, len(chosen), 64):
        batch = chosen[at : at + 64]
        answers = _generate(lm, [documents[i].ids for i in batch], config.answer_tokens)
        for index, answer in zip(batch, answers, strict=True):
            old = documents[index]
            answered[index] = Document(old.source, old.ids + answer, old.n_prompt, old.n_skip)
        progress(len(batch))
    return answered


def _generate(
    lm: LanguageModel, prompts: Sequence[tuple[int, ...]], n_new: int
) -> list[tuple[int, ...]]:
    width = max(len(p) for p in prompts)
    eos = min(lm.eos_ids)
    ids_BT = torch.full((len(prompts), width), eos)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    output_BT = lm.model.generate(  # type: ignore[operator]
        input_ids=ids_BT.to(lm.device),
        attention_mask=mask_BT.to(lm.device),
        max_new_tokens=n_new,
        do_sample=False,
        pad_token_id=eos,
    )
    answers = []
    for tokens in output_BT[:, width:].tolist():
        end = next((i for i, t in enumerate(tokens) if t in lm.eos_ids), len(tokens))
        answers.append(tuple(tokens[:end]))
    return answers


def split_documents(
    documents: Sequence[Document], config: TextConfig
) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents; no text is in both."""
    order = list(dict.fromkeys(documents))
    random.Random(config.seed).shuffle(order)
    cut = max(1, round(len(order) * config.held_out_share))
    return order[cut:], order[:cut]
