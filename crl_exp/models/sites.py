"""Where a named site is in an architecture, and hooks there: the one place that knows.

A decoder layer adds two things to the residual: x_s = x_{s−1} + attention + MLP. Residuals go by
their number, `attn_out` and `mlp_out` by layer and name: these two as they are added, behind the
norms that some architectures (Gemma-2) put there. Shapes: B rows, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from crl_exp.config.errors import UserError

RESIDUALS = {"resid_pre": -1, "resid_post": 0}
"""A residual's name, and whose output it is: of the layer itself, or of the one before it."""
ADDED = {
    "attn_out": ("post_attention_layernorm", ("self_attn", "attn", "attention")),
    "mlp_out": ("post_feedforward_layernorm", ("mlp", "feed_forward")),
}
"""What a layer adds: the norm behind it, where there is one, and what architectures call it."""
SITES = (*RESIDUALS, *ADDED)

Site = int | tuple[int, str]
"""The residual behind layer n, -1 that before layer 0; or a layer and a name of `ADDED`."""
See = Callable[[Tensor], Tensor | None]
"""Is shown [B, T, D] at a site; what it returns, if anything, goes on in its place."""


class Layered(Protocol):
    """A `LanguageModel`, as far as its sites go.

    in_tuple: whether layers hand their output on in a tuple; noted whenever a hook is called.
    home: the device that residuals are shown on, where layers lie on several; None: on one.
    """

    name: str
    layers: list[nn.Module]
    in_tuple: bool
    home: torch.device | None


def named_site(layer: int, name: str) -> Site:
    """The site that `resid_post` and the like, or what a layer adds, is at."""
    return layer + RESIDUALS[name] if name in RESIDUALS else (layer, name)


def hook(lm: Layered, site: Site, see: See) -> RemovableHandle:
    """Show `see` what is at a site, from now on until the handle is removed; of a spread model on
    `home`, and what it returns goes on where the layer computes.

    Raises `UserError` where it isn't known what a layer of this architecture adds.
    """
    if lm.home is not None:
        see = _at_home(see, lm.home)
    if isinstance(site, tuple):
        layer, name = site
        return _adding(lm, layer, name).register_forward_hook(_after(see))
    if site < 0:

        def before(_module, args, kwargs):
            if args:
                seen = see(args[0])
                return None if seen is None else ((seen, *args[1:]), kwargs)
            seen = see(kwargs["hidden_states"])
            return None if seen is None else (args, {**kwargs, "hidden_states": seen})

        return lm.layers[0].register_forward_pre_hook(before, with_kwargs=True)
    return lm.layers[site].register_forward_hook(_after(see, lm))


@contextmanager
def hooks(lm: Layered, see: Mapping[Any, See]) -> Iterator[None]:
    """Hooks at these sites while the block runs; removed however it ends. see: by `Site`."""
    with ExitStack() as stack:
        for site, one in see.items():
            stack.callback(hook(lm, site, one).remove)
        yield


def _at_home(see: See, home: torch.device) -> See:
    """See on one device what is on any; what wasn't changed isn't copied back."""

    def shown(x_BTD: Tensor) -> Tensor | None:
        here_BTD = x_BTD.to(home)
        seen_BTD = see(here_BTD)
        if seen_BTD is None:
            return None
        return x_BTD if seen_BTD is here_BTD else seen_BTD.to(x_BTD.device)

    return shown


def _after(see: See, lm: Layered | None = None) -> Callable[..., Any]:
    """See a module's output, alone or first in a tuple. lm: notes which, of a layer's."""

    def after(_module: nn.Module, _inputs: object, output: Tensor | tuple) -> Any:
        in_tuple = isinstance(output, tuple)
        if lm is not None:
            lm.in_tuple = in_tuple
        seen = see(output[0] if isinstance(output, tuple) else output)
        return (seen, *output[1:]) if in_tuple and seen is not None else seen

    return after


def _adding(lm: Layered, layer: int, name: str) -> nn.Module:
    """The module of a layer whose output is added to the residual."""
    block, (norm, names) = lm.layers[layer], ADDED[name]
    # A Llama has a norm of the one name too, which stands before its MLP.
    if hasattr(block, ADDED["mlp_out"][0]) and hasattr(block, norm):
        return getattr(block, norm)
    there = [getattr(block, one) for one in names if hasattr(block, one)]
    if len(there) != 1:
        raise UserError(
            f"hook_name={name}: layer {layer} of {lm.name} ({type(block).__name__}) has "
            f"{len(there)} of {', '.join(names)}, so it isn't known what is added; take resid_pre "
            "or resid_post"
        )
    return there[0]
