"""A model whose layers lie on several devices, or partly on the disk: accelerate's hooks move what
goes into each module to where it computes, and fetch weights that are kept elsewhere.

All that is ours (token ids, masks, SAEs, policies, kept residuals) lies on one device, home
(`model.device`). A residual that is shown at a site is brought there and taken back behind it
(`models.sites`); keys and values stay with their layer. Copies change no bit.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from crl_exp.config.errors import UserError

log = logging.getLogger(__name__)
META = torch.device("meta")


def dispatched(model: nn.Module) -> bool:
    """Whether accelerate moves things between this model's modules."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def computes_on(module: nn.Module) -> torch.device:
    """Where a module computes, wherever its weights are kept."""
    hook: Any = getattr(module, "_hf_hook", None)
    where = None if hook is None else hook.execution_device
    if where is not None:
        return torch.empty(0, device=where).device  # a number is a GPU's; cuda is the current one
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def home_of(model: nn.Module, asked: str | None) -> torch.device | None:
    """The one device of all that is ours. None: the model's own, which is not spread.

    asked: `model.device`; None: where the embeddings compute.
    """
    if not dispatched(model):
        return None
    if asked is not None:
        return torch.empty(0, device=asked).device
    return computes_on(model.get_input_embeddings())  # type: ignore[operator]


def kept_elsewhere(model: nn.Module) -> list[str]:
    """Names of the weights that are fetched for each use (offloaded to the CPU or the disk)."""
    return [name for name, p in model.named_parameters() if p.device == META]


def fetched(module: nn.Module) -> AbstractContextManager[Any]:
    """Within, a module's own weights are on the device that it computes on."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def all_weights(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter once, in the order in which the model has them on one device.

    Tied weights that are kept elsewhere are no longer one tensor, but are counted as one.
    """
    names = dict(model.named_parameters())
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    for name, parameter in names.items():
        if tied.get(name) in names:
            continue
        if parameter.device != META:
            yield parameter
            continue
        above, _, own = name.rpartition(".")
        owner = model.get_submodule(above)
        with fetched(owner):
            yield getattr(owner, own)


def layout(layers: list[nn.Module]) -> str:
    """Where the layers compute, and how many have weights that are kept elsewhere, in words."""
    counted = Counter(str(computes_on(layer)) for layer in layers)
    told = ", ".join(f"{n} layers on {device}" for device, n in counted.items())
    away = sum(bool(kept_elsewhere(layer)) for layer in layers)
    return told + (f"; weights of {away} are kept on the CPU or the disk" if away else "")


def tell(name: str, model: nn.Module, layers: list[nn.Module]) -> None:
    """Log where a spread model lies; a warning where it didn't fit on the GPUs."""
    told = f"model.device_map: {name} has {layout(layers)}"
    if away := kept_elsewhere(model):
        log.warning(
            "%s. %d weights are fetched anew for every token, which is slow: take more GPUs "
            "(hydra.launcher.gpus), or model.quantization", told, len(away),
        )  # fmt: skip
    else:
        log.info("%s", told)


def refuse_kept_elsewhere(model: nn.Module, name: str, who: str) -> None:
    """Raise `UserError` where weights would have to stay for a backward pass, and don't."""
    if away := kept_elsewhere(model):
        raise UserError(
            f"{who}: gradients need all weights of {name} on the GPUs, and model.device_map keeps "
            f"{len(away)} of them on the CPU or the disk ({away[0]}, …). Take more GPUs "
            "(hydra.launcher.gpus), model.quantization=nf4 with fewer, or another method"
        )
