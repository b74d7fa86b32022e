"""Batched greedy generation under the control of one or several controllers.

Steering begins at the last prompt token. Everything before it, and everything below the first
steered layer at it, comes from the prompt store and is not computed again. Each controller has
its own rows; the model runs once for all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from crl_exp.decode import Decoding, Generation, Job, cut_at
from crl_exp.errors import UserError
from crl_exp.models import LanguageModel
from crl_exp.prompts import Progress, PromptBatch, PromptStore, common_prefix

log = logging.getLogger(__name__)


@dataclass
class EngineConfig:
    """How prompts are read and answers generated.

    batch_size: rows that go through the model together.
    keep_gib: memory for kept prompts, GiB; a split that needs more is read again for each batch.
    """

    batch_size: int
    keep_gib: float

    def faults(self) -> list[str]:
        found = []
        if self.batch_size < 1:
            found.append(f"engine.batch_size={self.batch_size}: must be at least 1")
        if not self.keep_gib >= 0:
            found.append(f"engine.keep_gib={self.keep_gib}: must be 0 or more")
        return found


class Prompts(Protocol):
    """A split's prompts, kept or read anew for each batch."""

    def __len__(self) -> int: ...

    def batch(self, items: Sequence[int]) -> PromptBatch: ...


class StreamedPrompts:
    """Prompts too many to keep: each batch is read when it is asked for."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[Sequence[int]], batch_size: int):
        self.lm, self.prompts, self.batch_size = lm, prompts, batch_size

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, items: Sequence[int]) -> PromptBatch:
        store = PromptStore(self.lm, [self.prompts[i] for i in items], self.batch_size)
        return store.batch(range(len(items)))


class Engine:
    """Owns the model: reads prompts, generates, and calls controllers at their layers."""

    def __init__(self, lm: LanguageModel, config: EngineConfig):
        self.lm = lm
        self.config = config

    def read(
        self, prompts: Sequence[Sequence[int]], progress: Progress | None = None
    ) -> PromptStore | StreamedPrompts:
        """Read prompts once and keep them, or stream them where `engine.keep_gib` is too small."""
        longest = max((len(p) for p in prompts), default=0)
        limit = self.lm.max_positions
        if not prompts or min(len(p) for p in prompts) < 1:
            raise UserError("a prompt is empty; check task.chat_template and the data")
        if limit and longest >= limit:
            raise UserError(
                f"a prompt has {longest} tokens, but {self.lm.name} takes {limit}; "
                "shorten the task's prompts or choose another model"
            )
        needed = self._kept_bytes(prompts) / 2**30
        if needed > self.config.keep_gib:
            log.warning(
                "%d prompts need %.1f GiB, more than engine.keep_gib=%s: they are read again for "
                "every batch, which is slow; raise engine.keep_gib if there is memory for it",
                len(prompts), needed, self.config.keep_gib,
            )  # fmt: skip
            return StreamedPrompts(self.lm, prompts, self.config.batch_size)
        return PromptStore(self.lm, prompts, self.config.batch_size, progress)

    def _kept_bytes(self, prompts: Sequence[Sequence[int]]) -> int:
        """Memory of the kept prompts: keys and values of each token, one residual a site."""
        prefix = common_prefix(prompts)
        n_tokens = prefix + sum(len(p) - prefix for p in prompts)
        per_token = 2 * self.lm.n_layers * self.lm.d_kv
        per_prompt = (self.lm.n_layers + 1) * self.lm.d_model
        return (n_tokens * per_token + len(prompts) * per_prompt) * self.lm.dtype.itemsize

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        jobs: Sequence[Job],
        max_new_tokens: int,
        choices: Sequence[int] | None = None,
        record: bool = False,
        progress: Progress | None = None,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """Answer every job's items, greedily.

        choices: restrict the first token to these ids (then one token is generated).
        record: keep every action (`Generation.steps`).
        stop: texts that end an answer; its text is cut before the first of them.
        Returns one `Generation` a job. Raises `UserError` where a job has no items.
        """
        assert max_new_tokens >= 1
        if any(len(job.items) == 0 for job in jobs):
            raise UserError("nothing to generate: a job has no items")
        results = [Generation([], []) for _ in jobs]
        share = max(1, self.config.batch_size // len(jobs))
        for at in range(0, max(len(job.items) for job in jobs), share):
            part = [Job(job.controller, list(job.items[at : at + share])) for job in jobs]
            present = [i for i, job in enumerate(part) if job.items]
            prompt = prompts.batch([item for i in present for item in part[i].items])
            batch = Decoding(self.lm, prompt, [part[i] for i in present], record, stop)
            batch.run(1 if choices else max_new_tokens, choices)
            for index, rows in zip(present, batch.rows, strict=True):
                batch.hand_over(results[index], rows, at)
            if progress:
                progress(sum(len(job.items) for job in part))
        for result in results:
            texts = self.lm.tokenizer.batch_decode(result.tokens, skip_special_tokens=True)
            result.texts = [cut_at(text, stop) for text in texts]
        return results
