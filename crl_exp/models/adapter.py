"""Low-rank adapters of a shared model: there while they are on, gone without a trace otherwise.

LoRA (Hu et al., arXiv 2106.09685), by peft: W x + scale · B A x, where B begins at zero.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.placement import refuse_kept_elsewhere

NAME = "default"  # peft's, of the one adapter


def peft_fault() -> str:
    """What to do where peft isn't there."""
    if importlib.util.find_spec("peft") is not None:
        return ""
    return "method=lora needs peft: pip install -c constraints.txt peft"


@dataclass
class _Place:
    """name: of the layer of weights in the model. parent, child: where it hangs."""

    name: str
    parent: nn.Module
    child: str
    plain: nn.Module
    adapted: Any  # peft's LoraLayer


class Adapter:
    """Adapters of a few decoder layers' weights; off after it is made.

    targets: last part of the names of the weights (`q_proj`). Raises `UserError` where a layer has
    no such weights, and where some are kept off the GPUs (`models.placement`).
    """

    def __init__(
        self,
        lm: LanguageModel,
        layers: Sequence[int],
        targets: Sequence[str],
        rank: int,
        scale: float,
        dropout: float,
    ):
        from peft import LoraConfig, inject_adapter_in_model

        refuse_kept_elsewhere(lm.model, lm.name, "method=lora")
        self.rank, self.places = rank, []
        for layer in layers:
            block = lm.layers[layer]
            names = [name for name, _ in weights_of(lm, layer, targets)]
            plain = {name: block.get_submodule(name) for name in names}
            config = LoraConfig(
                r=rank, lora_alpha=scale * rank, lora_dropout=dropout, target_modules=names,  # type: ignore[arg-type]
                fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in plain.values()),
            )  # fmt: skip
            inject_adapter_in_model(config, block)
            del block.peft_config  # peft's note on the block, which it would take for a second one
            for name in names:
                above, _, child = name.rpartition(".")
                adapted = block.get_submodule(name)
                place = _Place(f"{layer}.{name}", block.get_submodule(above), child, plain[name],
                               adapted)  # fmt: skip
                self.places.append(place)
                setattr(place.parent, child, place.plain)

    @contextmanager
    def on(self, training: bool = False) -> Iterator[None]:
        """Within, the model is the adapted one. training: with dropout."""
        try:
            for place in self.places:
                place.adapted.train(training)
                setattr(place.parent, place.child, place.adapted)
            yield
        finally:
            for place in self.places:
                setattr(place.parent, place.child, place.plain)

    def named(self) -> dict[str, nn.Parameter]:
        """A and B of each place."""
        return {
            f"{place.name}.{kind}": getattr(place.adapted, f"lora_{kind}")[NAME].weight
            for place in self.places
            for kind in ("A", "B")
        }

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.named().values())

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.named().items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.named().items():
            parameter.copy_(state[name])

    def unmoved(self) -> list[str]:
        """Places whose B is still zero: nothing was learned there."""
        moved = self.named()
        return [one.name for one in self.places if not bool(moved[f"{one.name}.B"].any())]


def weights_of(
    lm: LanguageModel, layer: int, targets: Sequence[str]
) -> list[tuple[str, tuple[int, int]]]:
    """Name in the layer, and both widths, of the weights that are named so.

    Raises `UserError` where one of the names is nowhere in the layer.
    """
    found = {
        name: _widths(module)
        for name, module in lm.layers[layer].named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    known = sorted({name.rpartition(".")[2] for name in found})
    for target in targets:
        if target not in known:
            raise UserError(
                f"method.targets={list(targets)}: layer {layer} of {lm.name} has no weights "
                f"{target!r}{did_you_mean(target, known)}; it has {', '.join(known)}"
            )
    return [(name, size) for name, size in found.items() if name.rpartition(".")[2] in targets]


def _widths(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Linear):  # not the weight's own shape: it may be quantised
        return module.in_features, module.out_features
    return module.weight.shape[0], module.weight.shape[1]
