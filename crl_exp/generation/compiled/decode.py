"""`engine.decode=compiled`: the tokens after the first by one captured step.

The last prompt token goes through the model as ever, which starts at the first steered layer. Rows
that have ended stay until the living ones fit into a frame of half the rows. Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from crl_exp.generation.compiled.buffers import frame_rows, padded_tokens
from crl_exp.generation.compiled.step import CompiledStep, Made, Steps, refuse_at_output, steering
from crl_exp.generation.controller import Action
from crl_exp.generation.decode import Decoding
from crl_exp.models.kv_cache import Running


class CompiledDecoding(Decoding):
    """As `Decoding`. steps: of the engine."""

    def __init__(self, *given: Any, steps: Steps, **more: Any):
        super().__init__(*given, **more)
        self.compiled, self.n_new = steps, 0
        self.now_playing: CompiledStep | None = None

    def run(self, max_new_tokens: int, choices: Sequence[int] | None) -> None:
        if max_new_tokens > 1:
            steering(
                self.all_groups
            )  # whoever can't be captured is told before anything is computed
            for part in self.parts:
                refuse_at_output(part.controller)
        self.n_new = max_new_tokens
        try:
            super().run(max_new_tokens, choices)
        except (torch.OutOfMemoryError, MemoryError):
            self.compiled.forget()
            raise

    def _step(self, index: int, now: Running, choices: Sequence[int] | None) -> Tensor:
        if index == 0:
            return super()._step(index, now, choices)
        if self.now_playing is None:
            n_tokens = padded_tokens(now.key_RT.shape[1] + self.n_new - 1)
            frame = self.compiled.frame(len(now.token_R), n_tokens, now.cache)
            self.now_playing = self.compiled.step(frame, self.all_groups, self.record)
            frame.fill(now, index)
            self.now_playing.fill(self.all_groups)
            now.cache = DynamicCache()  # it isn't read again
        made = self.now_playing()
        self._take(self.now_playing, index, made)
        return made.token_B[: len(self.alive_R)]

    def _take(self, step: CompiledStep, index: int, made: Made) -> None:
        """Record what was done, and show the residuals to those who only look."""
        if self.record:
            for (_, group), place, tensors in zip(
                steering(self.all_groups), step.places, made.actions, strict=True
            ):
                starts = [i * place.most for i in range(len(group.sizes))]
                slices = [
                    slice(start, start + size)
                    for start, size in zip(starts, group.sizes, strict=True)
                ]
                self._record(group, index, Action(**tensors), slices)
        for site, groups in self.all_groups.at(steering=False).items():
            for group in groups:
                self._act(group, made.seen[site][group.rows], index)

    def _drop_ended(self, now: Running) -> None:
        step = self.now_playing
        if step is None:
            super()._drop_ended(now)
            return
        index_R = self.alive_R.nonzero()[:, 0]
        # A smaller graph saves some time, compiling one again and again costs far more.
        if frame_rows(len(index_R)) >= step.frame.n_rows or self.compiled.full:
            return
        step.release(self.all_groups)
        self._leave(index_R)
        smaller = self.compiled.frame(len(index_R), step.frame.n_tokens)
        self.now_playing = self.compiled.step(smaller, self.all_groups, self.record)
        smaller.move(step.frame, index_R)
        self.now_playing.fill(self.all_groups)
