"""Answers scored by a reward or preference model (`task.scorer=preference_model`).

A classifier of Hugging Face's with exactly one logit, which reads the question and the answer: as a
conversation of two turns where its own tokenizer has a chat template, else as a text pair. The
logit has no scale of its own; `map` makes a reward from 0 to 1 of it:

    sigmoid   1 / (1 + e^-logit)
    rank      (#{r < logit} + #{r = logit} / 2) / N, where r are the logits of the N answers that
              the unsteered model gives to the training items: over these the mean is .5

No answer to a validation or test item is looked at for the map. Logits are kept: `kept_logits`.
Shapes: B answers of a batch, T tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.files import content_key, home
from crl_exp.config.machine.digests import folder_digest
from crl_exp.tasks.base import Item, Score
from crl_exp.tasks.own.function import shown
from crl_exp.tasks.own.kept_logits import KeptLogits
from crl_exp.tasks.scorers.models import ScorerModel, load_scorer

WHERE = "task.preference_model"
OFFLINE = "task.scorer=answer"
MAPS = ("sigmoid", "rank")
CONVERSATION, PAIR = "conversation", "text pair"


@dataclass
class PreferenceModel:
    """A reward or preference model.

    path: a local folder or a hub id. revision: hub revision (null: the default branch).
    device: cpu, cuda, cuda:1, … batch_size: answers scored together.
    map: sigmoid or rank. digest: of the folder's files, which is found when a run is composed; null
        for a model of the hub.
    """

    path: str | None
    revision: str | None
    device: str
    batch_size: int
    map: str
    digest: str | None

    @property
    def model(self) -> ScorerModel:
        return ScorerModel(str(self.path), self.revision, self.device, self.batch_size)

    def faults(self) -> list[str]:
        """What is wrong with the values, each with the override that mends it."""
        found = self.model.faults(WHERE)
        if not self.path:
            found.append(f"{WHERE}.path: is not given; set it to a folder or a hub id")
        if self.map not in MAPS:
            near = did_you_mean(self.map, MAPS)
            found.append(f"{WHERE}.map={self.map}: must be one of {', '.join(MAPS)}{near}")
        return found


def digest_of(path: str) -> str | None:
    """Of a model's folder; None for a hub id. Raises `UserError` for a folder that isn't there."""
    folder, key = home(path, f"{WHERE}.path"), f"{WHERE}.path={path}"
    if folder.is_dir():
        return folder_digest(folder, key)
    if folder.exists() or path.startswith(("/", "~", ".")) or path.count("/") != 1:
        raise UserError(f"{key}: there is no such folder; give one, or a hub id (OWNER/NAME)")
    return None


class PreferenceScorer:
    """Scores by one model, and counts what that took. counts: answers that it read (`scored`), and
    those whose logits were found on disk or in memory (`kept`)."""

    def __init__(self, config: PreferenceModel):
        self.config = config
        self.counts = {"scored": 0, "kept": 0}
        self.unsteered: list[float] | None = None  # logits, sorted; of `map=rank`
        self.kept: KeptLogits | None = None  # once the model is loaded

    @property
    def name(self) -> str:
        of = self.config.digest or self.config.revision or "hub"
        model = str(self.config.path).rstrip("/").rpartition("/")[2]
        return f"preference_model({model}@{of}, {self.config.map})"

    def load(self) -> tuple[Any, Any]:
        """Model and tokenizer. Raises `UserError` where it can't be had, isn't what it was when the
        run was composed, or isn't a classifier with one logit."""
        key, digest = f"{WHERE}.path={self.config.path}", self.config.digest
        now = digest_of(str(self.config.path))
        if digest is not None and now != digest:
            raise UserError(
                f"{key}: its files were changed since this run was frozen (digest {digest} then, "
                f"{now or 'none'} now). Put them back, or launch the line again: with another "
                "model it is another run"
            )
        model, tokenizer = load_scorer(self.config.model, WHERE, OFFLINE, digest or "")
        if (n := model.config.num_labels) != 1:
            raise UserError(
                f"{key}: gives {n} logits for an answer, and a reward is one: a classifier with a "
                f"single logit (num_labels=1) is needed. Choose such a model, or {OFFLINE}"
            )
        if self.kept is None:
            commit = getattr(model.config, "_commit_hash", None)
            of = digest or commit or content_key([self.config.path, self.config.revision])
            self.kept = KeptLogits(str(of))
        return model, tokenizer

    def told(self) -> dict[str, Any]:
        """For the result's notes."""
        _, tokenizer = self.load()
        found = {
            "path": self.config.path, "digest": self.config.digest, "map": self.config.map,
            "read_as": _read_as(tokenizer), **self.counts,
        }  # fmt: skip
        return found if self.unsteered is None else {**found, "ranked_among": len(self.unsteered)}

    def take_unsteered(self, items: Sequence[Item], outputs: Sequence[str]) -> None:
        """The answers that logits are ranked among."""
        self.unsteered = sorted(self.logits(items, outputs))

    def __call__(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        """Raises `UserError` with the item where there is no reward for it."""
        return [
            Score(self.reward(logit), valid=bool(output.strip()))
            for logit, output in zip(self.logits(items, outputs), outputs, strict=True)
        ]

    def reward(self, logit: float) -> float:
        """From 0 to 1. Raises `UserError` where there is nothing to rank it among."""
        if self.config.map == "sigmoid":
            return 0.5 * (1 + math.tanh(logit / 2))
        if not self.unsteered:
            raise UserError(
                f"{WHERE}.map=rank: ranks among the unsteered model's answers, which only a run "
                f"has; set {WHERE}.map=sigmoid"
            )
        below = bisect_left(self.unsteered, logit)
        return (below + bisect_right(self.unsteered, logit)) / (2 * len(self.unsteered))

    def logits(self, items: Sequence[Item], outputs: Sequence[str]) -> list[float]:
        """One for each answer; the same content is read once. Raises `UserError` as a call does."""
        model, tokenizer = self.load()
        assert self.kept is not None
        pairs = [(item.user, output) for item, output in zip(items, outputs, strict=True)]
        first = dict(zip(reversed(pairs), reversed(items), strict=True))
        there = self.kept.find(first)
        missing = [pair for pair in first if pair not in there]
        if missing:
            fed = {pair: _fed(tokenizer, *pair) for pair in missing}
            _refuse_long(fed, first, model, tokenizer)
            missing.sort(key=lambda pair: len(fed[pair]["input_ids"]))
            size = self.config.batch_size if _can_pad(model) else 1
            found: dict[tuple[str, str], float] = {}
            for at in range(0, len(missing), size):
                batch = missing[at : at + size]
                logit_B = _forward(model, [fed[pair] for pair in batch])
                found.update(zip(batch, logit_B, strict=True))
            for pair, logit in found.items():
                if not math.isfinite(logit):
                    raise UserError(
                        f"{WHERE}.path={self.config.path}: gives {logit} for an answer, which is "
                        f"no reward; {shown(first[pair])}, answer {pair[1][:60]!r}"
                    )
            self.kept.add(found)
            there |= found
        self.counts["scored"] += len(missing)
        self.counts["kept"] += len(pairs) - len(missing)
        return [there[pair] for pair in pairs]


def _read_as(tokenizer: Any) -> str:
    return CONVERSATION if tokenizer.chat_template else PAIR


def _fed(tokenizer: Any, prompt: str, answer: str) -> dict[str, list[int]]:
    """What the model reads of one answer, by input [T]."""
    if _read_as(tokenizer) == PAIR:
        return dict(tokenizer(prompt, answer))
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return dict(tokenizer(text, add_special_tokens=False))  # the template has its own


def _refuse_long(
    fed: dict[tuple[str, str], dict[str, list[int]]],
    items: dict[tuple[str, str], Item],
    model: Any,
    tokenizer: Any,
) -> None:
    """Raise `UserError` for what is longer than the model reads: it isn't cut."""
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    if "roberta" in model.config.model_type:  # which counts positions from behind the padding's
        positions -= model.config.pad_token_id + 1
    longest = min(positions, tokenizer.model_max_length)
    for pair, inputs in fed.items():
        if (n := len(inputs["input_ids"])) > longest:
            raise UserError(
                f"{WHERE}: question and answer have {n} tokens, and the model reads {longest}; "
                f"{shown(items[pair])}. Lower task.max_new_tokens, or leave the question out"
            )


def _can_pad(model: Any) -> bool:
    """Whether rows of different lengths may stand together: a decoder finds a row's last token by
    the padding's id, and refuses two rows where its config has none."""
    return model.config.get_text_config().pad_token_id is not None


def _forward(model: Any, rows: Sequence[dict[str, list[int]]]) -> list[float]:
    """A logit for each row, padded on the right [B]."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": model.config.get_text_config().pad_token_id or 0}
    inputs = {
        name: torch.tensor(
            [row[name] + [padding.get(name, 0)] * (longest - len(row[name])) for row in rows]
        ).to(model.device)
        for name in rows[0]
    }
    with torch.no_grad():
        return model(**inputs).logits[:, 0].float().tolist()
