"""Batched greedy generation under the control of one or several controllers.

Steering begins at the last prompt token. Everything before it, and everything below the first
steered layer at it, comes from the prompt store and is not computed again. Each controller has
its own rows; the model runs once for all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from crl_exp.config.errors import UserError
from crl_exp.generation.compiled.decode import CompiledDecoding
from crl_exp.generation.compiled.step import Steps
from crl_exp.generation.config import COMPILED_AND_SPREAD, EngineConfig
from crl_exp.generation.decode import Decoding
from crl_exp.generation.grouping import JobRows, Teams, start_layer
from crl_exp.generation.option_decode import OptionDecoding
from crl_exp.generation.prompts import Progress, PromptBatch, PromptStore
from crl_exp.generation.results import Generation, Job, cut_at, joined
from crl_exp.models.batching import BatchSize, batches, bytes_to_decode, bytes_to_keep
from crl_exp.models.choice import ItemOptions, Options
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.prompt_text import common_prefix

log = logging.getLogger(__name__)
ENOUGH_ROWS = {"cpu": 32, "cuda": 256}
"""From about so many rows on, a layer takes as long as its arithmetic and not as reading it."""


class Prompts(Protocol):
    """A split's prompts, kept or read anew for each batch. prompts: their token ids. options: of
    each one, where each has its own."""

    @property
    def prompts(self) -> Sequence[Sequence[int]]: ...

    @property
    def options(self) -> Sequence[Options] | None: ...

    def __len__(self) -> int: ...

    def batch(self, items: Sequence[int]) -> PromptBatch: ...


class StreamedPrompts:
    """Prompts too many to keep: each batch is read when it is asked for."""

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        size: BatchSize,
        options: Sequence[Options] | None = None,
    ):
        self.lm, self.prompts, self.size, self.options = lm, prompts, size, options

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, items: Sequence[int]) -> PromptBatch:
        store = PromptStore(self.lm, [self.prompts[i] for i in items], self.size)
        return store.batch(range(len(items)))


def options_at(prompts: Prompts, items: Sequence[int]) -> list[Options]:
    """The options of these prompts, each of which has its own."""
    assert prompts.options is not None, "read without their options"
    return [prompts.options[item] for item in items]


class Engine:
    """Owns the model: reads prompts, generates, and calls controllers at their layers."""

    def __init__(self, lm: LanguageModel, config: EngineConfig):
        self.lm = lm
        self.config = config
        self.batch_size = BatchSize(config.batch_size)
        if config.decode == "compiled" and lm.home is not None:
            raise UserError(COMPILED_AND_SPREAD)
        self.compiled = Steps(lm) if config.decode == "compiled" else None

    def read(
        self,
        prompts: Sequence[Sequence[int]],
        progress: Progress | None = None,
        options: Sequence[Options] | None = None,
    ) -> PromptStore | StreamedPrompts:
        """Read prompts once and keep them, or stream them where `engine.keep_gib` is too small.

        options: of each prompt, where each has its own (`ItemOptions`).
        """
        longest = max((len(p) for p in prompts), default=0)
        limit = self.lm.max_positions
        if not prompts or min(len(p) for p in prompts) < 1:
            raise UserError("a prompt is empty; check task.chat_template and the data")
        if limit and longest >= limit:
            raise UserError(
                f"a prompt has {longest} tokens, but {self.lm.room()}; "
                "shorten the task's prompts or choose another model"
            )
        needed = self._kept_bytes(prompts) / 2**30
        if needed > self.config.keep_gib:
            log.warning(
                "%d prompts need %.1f GiB, more than engine.keep_gib=%s: they are read again for "
                "every batch, which is slow; raise engine.keep_gib if there is memory for it",
                len(prompts), needed, self.config.keep_gib,
            )  # fmt: skip
            return StreamedPrompts(self.lm, prompts, self.batch_size, options)
        return PromptStore(self.lm, prompts, self.batch_size, progress, options)

    def _kept_bytes(self, prompts: Sequence[Sequence[int]]) -> int:
        """Memory of the kept prompts: keys and values of each token, one residual a site."""
        prefix = common_prefix(prompts)
        n_tokens = prefix + sum(len(p) - prefix for p in prompts)
        per_token = 2 * self.lm.n_layers * self.lm.d_kv
        per_prompt = (self.lm.n_layers + 1) * self.lm.d_model
        return (n_tokens * per_token + len(prompts) * per_prompt) * self.lm.dtype.itemsize

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While something that runs share is made. Nothing to do here (`experiments.packing`)."""
        yield

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        jobs: Sequence[Job],
        max_new_tokens: int,
        choices: Sequence[int] | Options | ItemOptions | None = None,
        record: bool = False,
        progress: Progress | None = None,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """Answer every job's items, greedily.

        choices: restrict the first token to these ids (then one token is generated), or the answer
            to these options, or to those of each prompt. Where those have several tokens, a batch
            has fewer items, so that as many rows as ever go through the model together.
        record: keep every action (`Generation.steps`).
        stop: texts that end an answer; its text is cut before the first of them.
        Returns one `Generation` a job. What else is in a batch changes an answer's residuals by
        rounding alone. Raises `UserError` where a job has no items, or a batch doesn't fit into
        memory and `engine.batch_size` is a number.
        """
        assert max_new_tokens >= 1
        if any(len(job.items) == 0 for job in jobs):
            raise UserError("nothing to generate: a job has no items")
        options = choices if isinstance(choices, (Options, ItemOptions)) else None
        if options is not None:
            choices = options.one_token or options
        several = choices if isinstance(choices, (Options, ItemOptions)) else None
        new_tokens = 1 if choices else max_new_tokens
        if several is not None:
            new_tokens = several.longest
        results = [Generation([[] for _ in job.items], []) for job in jobs]
        teams = Teams()

        def play(rows: list[tuple[int, int]]) -> None:
            self._play(prompts, jobs, rows, results, new_tokens, choices, record, stop, teams)
            if progress:
                progress(len(rows))

        lengths = [[len(prompts.prompts[item]) for item in job.items] for job in jobs]
        longest = max(max(own) for own in lengths)
        # Who looks keeps what it saw until the answers are there; what is recorded stays longer.
        layers = [len(job.controller.sites) for job in jobs if record or not job.controller.steers]
        row = bytes_to_decode(self.lm, longest + new_tokens)
        row += bytes_to_keep(self.lm, new_tokens, max(layers, default=0))
        # A graph's own cache has room for up to twice as many rows.
        row = row if self.compiled is None else 2 * row
        n_branches = 1 if several is None else max(1, several.n_longer)
        if isinstance(self.config.batch_size, int):
            size = max(1, self.config.batch_size // n_branches)
        else:  # the prompt's row and its branches are there at once
            row *= 1 + n_branches * (several is not None)
            size = self.batch_size.rows(row, self.lm.devices, self.lm.scratch.nbytes)
        starts = [start_layer(job.controller, new_tokens, self.lm.n_layers) for job in jobs]
        enough = ENOUGH_ROWS.get(self.lm.device.type, ENOUGH_ROWS["cuda"])
        self.batch_size.play(batches(lengths, size, starts, enough), play)
        for job, result in zip(jobs, results, strict=True):
            result.texts = self._texts(prompts, job, result.tokens, options, stop)
            result.steps, result.others = joined(result.steps), joined(result.others)
        return results

    def _texts(
        self,
        prompts: Prompts,
        job: Job,
        answers: list[list[int]],
        options: Options | ItemOptions | None,
        stop: Sequence[str],
    ) -> list[str]:
        if isinstance(options, ItemOptions):
            own = options_at(prompts, job.items)
            return [o.texts_of([ids])[0] for o, ids in zip(own, answers, strict=True)]
        if options is not None and options.texts:
            return options.texts_of(answers)
        texts = self.lm.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [cut_at(text, stop) for text in texts]

    def _play(
        self,
        prompts: Prompts,
        jobs: Sequence[Job],
        rows: list[tuple[int, int]],
        results: list[Generation],
        new_tokens: int,
        choices: Sequence[int] | Options | ItemOptions | None,
        record: bool,
        stop: Sequence[str],
        teams: Teams,
    ) -> None:
        """Decode one batch of (job, position among its items) and take its answers into results."""
        parts: dict[int, JobRows] = {}
        for index, at in rows:
            job = jobs[index]
            part = parts.setdefault(index, JobRows(job.controller, [], [], len(job.items)))
            part.items.append(job.items[at])
            part.row_B.append(at)
        items = [item for part in parts.values() for item in part.items]
        prompt = prompts.batch(items)
        given = (self.lm, prompt, list(parts.values()), record, stop, teams)
        batch: Decoding
        if isinstance(choices, (Options, ItemOptions)):
            batch = read_out = OptionDecoding(*given)
            each = isinstance(choices, ItemOptions)
            read_out.choose(options_at(prompts, items) if each else [choices] * len(items))
            for (index, _), others in zip(parts.items(), read_out.others, strict=True):
                results[index].others += others
        elif self.compiled is None:
            batch = Decoding(*given)
            batch.run(new_tokens, choices)
        else:
            batch = CompiledDecoding(*given, steps=self.compiled)
            batch.run(new_tokens, choices)
        for (index, at), tokens in zip(rows, batch.tokens, strict=True):
            results[index].tokens[at] = tokens
        for index, steps in zip(parts, batch.steps, strict=True):
            living = (step.living() for step in steps)
            results[index].steps += [step for step in living if step.rows]
