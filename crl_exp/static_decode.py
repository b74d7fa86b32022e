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

from crl_exp.cache import Running
from crl_exp.controllers.base import Action
from crl_exp.decode import Decoding
from crl_exp.static_frame import frame_rows, padded_tokens
from crl_exp.static_step import CompiledStep, Made, Steps, refuse_at_output, steering


class CompiledDecoding(Decoding):
    """As `Decoding`. steps: of the engine."""

    def __init__(self, *given: Any, steps: Steps, **more: Any):
        super().__init__(*given, **more)
        self.compiled, self.n_new = steps, 0
        self.now_playing: CompiledStep | None = None

    def run(self, max_new_tokens: int, choices: Sequence[int] | None) -> None:
        if max_new_tokens > 1:
            steering(self.lineup)  # whoever can't be captured is told before anything is computed
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
            self.now_playing = self.compiled.step(frame, self.lineup, self.record)
            frame.fill(now, index)
            self.now_playing.fill(self.lineup)
            now.cache = DynamicCache()  # it isn't read again
        made = self.now_playing()
        self._take(self.now_playing, index, made)
        return made.token_B[: len(self.alive_R)]

    def _take(self, step: CompiledStep, index: int, made: Made) -> None:
        """Record what was done, and show the residuals to those who only look."""
        if self.record:
            for (_, troop), place, tensors in zip(
                steering(self.lineup), step.places, made.actions, strict=True
            ):
                starts = [i * place.most for i in range(len(troop.sizes))]
                slices = [
                    slice(start, start + size)
                    for start, size in zip(starts, troop.sizes, strict=True)
                ]
                self._record(troop, index, Action(**tensors), slices)
        for site, troops in self.lineup.at(steering=False).items():
            for troop in troops:
                self._act(troop, made.seen[site][troop.rows], index)

    def _drop_ended(self, now: Running) -> None:
        step = self.now_playing
        if step is None:
            super()._drop_ended(now)
            return
        index_R = self.alive_R.nonzero()[:, 0]
        # A smaller graph saves some time, compiling one again and again costs far more.
        if frame_rows(len(index_R)) >= step.frame.n_rows or self.compiled.full:
            return
        step.release(self.lineup)
        self._leave(index_R)
        smaller = self.compiled.frame(len(index_R), step.frame.n_tokens)
        self.now_playing = self.compiled.step(smaller, self.lineup, self.record)
        smaller.move(step.frame, index_R)
        self.now_playing.fill(self.lineup)
