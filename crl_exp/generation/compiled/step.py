"""One decoding step as a graph: the model, the steering, the next token. Shapes: B rows, D d_model.

The step is recorded once (`make_fx`) and compiled: with CUDA graphs on a GPU, by C++ on a CPU.
It takes nothing from one token to the next but what lies in its frame, so no token compiles anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import DynamicCache

from crl_exp.analysis.row_random import capturing
from crl_exp.config.errors import UserError
from crl_exp.generation.compiled.buffers import Frame, GroupBuffers, frame_rows
from crl_exp.generation.controller import Controller
from crl_exp.generation.grouping import ControllerGroup, ControllerGroups
from crl_exp.models.kv_cache import keys_values
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.sites import hooks

EAGER = "set engine.decode=eager"
KEPT_STEPS = 16
"""Compiled steps that are kept, the last used ones; each has its frame's cache."""


def compiled(graph: torch.fx.GraphModule, device: torch.device) -> Callable:
    """With CUDA graphs on a GPU; by C++ on a CPU."""
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(graph, fullgraph=True, dynamic=False, mode=mode)


def check_machine(device: torch.device) -> None:
    """Raise `UserError` where nothing can be compiled."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cuda":
        if not has_triton():
            raise UserError(f"engine.decode=compiled needs Triton for this GPU; {EAGER}")
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            f"engine.decode=compiled needs a C++ compiler, and none was found; install g++, or "
            f"{EAGER}"
        ) from error


@dataclass
class Made:
    """What a step gives: the next tokens, residuals at the sites where controllers look, and the
    tensors of each place's action."""

    token_B: Tensor
    seen: dict[int, Tensor]
    actions: list[dict[str, Any]]


class CompiledStep:
    """A captured step for one frame's shape and one set of groups."""

    def __init__(self, lm: LanguageModel, frame: Frame, all_groups: ControllerGroups, record: bool):
        self.lm, self.frame, self.record = lm, frame, record
        device = frame.token_B.device
        groups = steering(all_groups)
        self.places = [GroupBuffers(group, frame.n_rows, device) for _, group in groups]
        self.sites = [site for site, _ in groups]  # of each place
        self.looked = sorted(all_groups.at(steering=False))
        self.compiled: Callable | None = None

    @staticmethod
    def key(frame: Frame, all_groups: ControllerGroups, record: bool) -> Hashable:
        """Steps of the same key are the same graph."""
        who = tuple(
            (site, GroupBuffers.setting(group, frame.n_rows))
            for site, group in steering(all_groups)
        )
        return (
            frame.n_rows,
            frame.n_tokens,
            who,
            tuple(sorted(all_groups.at(steering=False))),
            record,
        )

    def fill(self, all_groups: ControllerGroups) -> None:
        """Take over the groups of a batch, with their weights and memories."""
        for place, (_, group) in zip(self.places, steering(all_groups), strict=True):
            place.fill(group, [all_groups.rows[index] for index in group.parts])

    def release(self, all_groups: ControllerGroups) -> None:
        for place, (_, group) in zip(self.places, steering(all_groups), strict=True):
            place.release(group)

    def tensors(self) -> list[Tensor]:
        return [*self.frame.tensors(), *(t for place in self.places for t in place.tensors())]

    def capture(self) -> None:
        """Record and compile. Changes what is in the frame: called before it is filled.

        Raises `UserError` where the step can't be captured.
        """
        from torch._dynamo import mark_static_address
        from torch.fx.experimental.proxy_tensor import make_fx

        held = self.tensors()
        for counter in (self.frame.position_B, self.frame.column_1):
            counter.zero_()  # of a frame that was used before, they may be at its end
        try:
            with capturing():
                graph = make_fx(lambda *_: self._step())(*held)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _cannot("captured", error) from error
        for tensor in held:
            mark_static_address(tensor)
        self.held = held
        self.compiled = compiled(graph, held[0].device)

    def __call__(self) -> Made:
        """The next token of every row; the frame is then ready for the one after."""
        from torch._dynamo.exc import TorchDynamoException

        assert self.compiled is not None
        try:
            made = self.compiled(*self.held)
        except TorchDynamoException as error:
            raise _cannot("compiled", error) from error
        if self.frame.token_B.is_cuda:  # a CUDA graph's outputs are written over by its next run
            made = tree_map(torch.clone, made)
        return Made(*made)

    def _step(self) -> tuple:
        """What is recorded. Only tensors in `tensors` are read or written."""
        lm, now = self.lm, self.frame
        seen: dict[int, Tensor] = {}
        actions: list[dict[str, Any]] = [{} for _ in self.places]
        now.key_BT.index_copy_(1, now.column_1, now.position_B[:, None])
        now.valid_BT.index_fill_(1, now.column_1, True)
        sites = sorted({*self.sites, *self.looked})
        with hooks(lm, {site: self._steer(site, seen, actions) for site in sites}):
            hidden_B1D = lm.decoder(
                input_ids=now.token_B[:, None],
                attention_mask=lm.mask(now.position_B[:, None], now.key_BT, now.valid_BT),
                position_ids=now.position_B[:, None],
                past_key_values=now.cache,
                use_cache=True,
            ).last_hidden_state
        token_B = lm.logits(hidden_B1D[:, -1]).argmax(dim=-1)
        now.token_B.copy_(token_B)
        for counter in (now.position_B, now.column_1, now.token_index):
            counter.add_(1)
        return token_B, seen, actions

    def _steer(
        self, site: int, seen: dict[int, Tensor], actions: list[dict[str, Any]]
    ) -> Callable[[Tensor], Tensor]:
        def steer(hidden_B1D: Tensor) -> Tensor:
            x_BD = hidden_B1D[:, -1]
            if site in self.looked:
                seen[site] = x_BD.clone()
            steered_B1D = hidden_B1D
            for index, (place, where) in enumerate(zip(self.places, self.sites, strict=True)):
                if where != site:
                    continue
                delta_BD, action = place.act(x_BD, self.frame.token_index)
                steered_B1D = steered_B1D + delta_BD[:, None].to(hidden_B1D.dtype)
                if self.record:
                    actions[index] = action.tensors()
            return steered_B1D

        return steer


def steering(all_groups: ControllerGroups) -> list[tuple[int, ControllerGroup]]:
    """Site and group of all who steer. Raises `UserError` where one has no team."""
    found = []
    for site, groups in sorted(all_groups.at(steering=True).items()):
        for group in groups:
            if group.team is None:
                who = type(all_groups.parts[group.parts[0]].controller).__name__
                raise UserError(
                    f"engine.decode=compiled can't capture {who}, which has no `team`; {EAGER}"
                )
            found.append((site, group))
    return found


def refuse_at_output(controller: Controller) -> None:
    """Raise `UserError` for a controller that wants to be shown the candidates' scores."""
    if controller.at_output:
        who = type(controller).__name__
        raise UserError(f"engine.decode=compiled can't show the scores to {who}; {EAGER}")


def _cannot(what: str, error: Exception) -> UserError:
    said = (str(error).strip().splitlines() or [""])[0]
    return UserError(
        f"engine.decode=compiled: the decoding step can't be {what} ({type(error).__name__}: "
        f"{said}); {EAGER}"
    )


class Steps:
    """Frames and compiled steps of one model, kept for the next batch of the same shape."""

    def __init__(self, lm: LanguageModel):
        check_machine(lm.device)
        self.lm = lm
        self.heads_L: list[tuple[int, int]] = []
        self.frames: dict[tuple[int, int], Frame] = {}
        self.made: dict[Hashable, CompiledStep] = {}

    def frame(self, n_rows: int, n_tokens: int, cache: DynamicCache | None = None) -> Frame:
        """Made where there is none of this shape. cache: what it has to hold, the first time."""
        if cache is not None and not self.heads_L:
            self.heads_L = [(keys.shape[1], keys.shape[3]) for keys, _ in keys_values(cache)]
        shape = frame_rows(n_rows), n_tokens
        if shape not in self.frames:
            self.frames[shape] = Frame(self.heads_L, *shape, self.lm.dtype, self.lm.device)
        return self.frames[shape]

    @property
    def full(self) -> bool:
        """Whether one more step would displace another."""
        return len(self.made) >= KEPT_STEPS

    def step(self, frame: Frame, all_groups: ControllerGroups, record: bool) -> CompiledStep:
        """The step for these; recorded first, if it has to be, so the frame is filled after it."""
        key = CompiledStep.key(frame, all_groups, record)
        if key not in self.made:
            step = CompiledStep(self.lm, frame, all_groups, record)
            step.capture()
            self.made[key] = step
        self.made[key] = self.made.pop(key)
        while len(self.made) > KEPT_STEPS:
            del self.made[next(iter(self.made))]
        used = [step.frame for step in self.made.values()]
        self.frames = {shape: one for shape, one in self.frames.items() if one in used}
        return self.made[key]

    def forget(self) -> None:
        """Give the memory back."""
        self.frames.clear()
        self.made.clear()
