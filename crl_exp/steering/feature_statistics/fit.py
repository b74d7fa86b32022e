"""The tokens that an SAE's fit is measured on, and the store of what was measured.

A small part of stage 1, whose statistics it leaves alone: the unsteered model answers some training
items, whose residuals are read at each SAE's site and the ones beside it, and a few prompts are
read as a whole. Shapes: B rows, T tokens, R living rows of a token, N tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crl_exp.analysis.sae_fit import TOKENS, SAEFit, evenly, warnings
from crl_exp.config.errors import UserError
from crl_exp.config.files import read_json, write_json
from crl_exp.config.keys import content_key
from crl_exp.generation.controller import Action, Controller, StepContext
from crl_exp.generation.engine import Engine
from crl_exp.generation.results import Job
from crl_exp.models.activations import read_forward
from crl_exp.models.batching import bytes_to_read
from crl_exp.models.prompt_text import common_prefix
from crl_exp.runs import preemption
from crl_exp.runs.inputs import sae_digest
from crl_exp.saes.fit import fit_on
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.controllers.observer import Seen
from crl_exp.steering.feature_statistics.store import locked
from crl_exp.steering.workspace import Workspace

FORMAT = 1
"""Of what is measured; figures of another format lie under other names."""
PROMPTS = 16
"""Items of which at least answers are read, and at most whole prompts."""
GATHERED = 4 * TOKENS
"""About how many tokens are gathered, of which `TOKENS` are taken once outliers are out."""


class Collector(Controller):
    """Keeps residuals of the steered tokens at some sites, and adds nothing.

    every: one in so many tokens of an answer is kept, from the last prompt token on.
    """

    steers = False

    def __init__(self, sites: Collection[int], every: int):
        super().__init__({site: site for site in sites})
        self.every = every
        self.kept: dict[int, list[tuple[int, Tensor, Tensor]]] = {site: [] for site in sites}

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action | None:
        Seen.of(layer, context).see(x_BD, context)
        return None

    def end(self, context: StepContext) -> None:
        for site, kept in self.kept.items():
            tokens = list(enumerate(Seen.of(site, context).taken(context)))[:: self.every]
            kept += [(index, x_RD, rows_R) for index, (x_RD, rows_R) in tokens]

    def residuals(self, without: Collection[int]) -> dict[int, Tensor]:
        """By site [N, D], ordered by item and token, however the rows were cut into batches.

        without: rows whose last prompt token is left out.
        """
        found = {}
        for site, kept in self.kept.items():
            place = {
                (row, index): x_D
                for index, x_RD, rows_R in kept
                for row, x_D in zip(rows_R.tolist(), x_RD, strict=True)
                if index or row not in without
            }
            vectors = [place[at] for at in sorted(place)]
            found[site] = torch.stack(vectors) if vectors else torch.empty(0, 1)
        return found


def steered_tokens(
    workspace: Workspace, engine: Engine, sites: Collection[int]
) -> dict[int, Tensor]:
    """Residuals [N, D] by site of the tokens that stage 1 reads, of items spread over the training
    split. A last prompt token that is a prompt's first, an attention sink, is left out."""
    ids = workspace.prompt_ids("train")
    n_items = max(PROMPTS, -(-TOKENS // workspace.n_tokens))
    chosen = evenly(len(ids), n_items)
    collector = Collector(sites, max(1, len(chosen) * workspace.n_tokens // GATHERED))
    prompts, items = workspace.prompts_kept("train"), chosen
    if prompts is None:  # the statistics were stored: the whole split needn't be read for this
        own = workspace.own_options("train")
        options = None if own is None else [own[i] for i in chosen]
        prompts = engine.read([ids[i] for i in chosen], options=options)
        items = list(range(len(chosen)))
    task = workspace.exp.task
    with workspace.bar("SAE fit, answers", len(items)) as advance:
        engine.generate(
            prompts, [Job(collector, items)], task.max_new_tokens, workspace.options,
            progress=advance, stop=task.stop_strings,
        )  # fmt: skip
    return collector.residuals({row for row, i in enumerate(chosen) if len(ids[i]) == 1})


def prompt_tokens(
    workspace: Workspace, engine: Engine, sites: Collection[int]
) -> dict[int, Tensor]:
    """Residuals [N, D] by site of prompts spread over the training split: of their tokens before
    the last one, the first and what all the split's prompts begin with left out."""
    ids = workspace.prompt_ids("train")
    first = max(1, common_prefix(ids))
    prompts = [ids[i] for i in evenly(len(ids), PROMPTS)]
    most = GATHERED // len(prompts)
    lengths = [max(len(prompt) - 1 - first, 0) for prompt in prompts]
    places = [first + torch.tensor(evenly(n, most), dtype=torch.long) for n in lengths]
    found: dict[int, dict[int, Tensor]] = {site: {} for site in sites}

    def read(rows: list[int]) -> None:
        preemption.check()

        def see(site: int, x_BTD: Tensor) -> None:
            for at, row in enumerate(rows):
                found[site][row] = x_BTD[at, places[row].to(x_BTD.device)]

        read_forward(
            workspace.lm, [prompts[row] for row in rows],
            {site: lambda x_BTD, site=site: see(site, x_BTD) for site in sites},
        )  # fmt: skip

    size = engine.batch_size
    n_rows = size.rows(bytes_to_read(workspace.lm, max(map(len, prompts))), workspace.lm.devices)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with torch.no_grad():
        size.play([order[at : at + n_rows] for at in range(0, len(order), n_rows)], read)
    return {site: torch.cat([rows[row] for row in sorted(rows)]) for site, rows in found.items()}


def measured(workspace: Workspace, saes: Sequence[LayerSAE]) -> list[SAEFit]:
    """How these SAEs fit the workspace's training split, all of them in one pass."""
    there = range(-1, workspace.lm.n_layers)
    sites = {site + step for site in (sae.site for sae in saes) for step in (-1, 0, 1)}
    sites = sorted(sites & set(there))
    # Not compiled: a graph of these sites would be made for a few tokens.
    engine = Engine(workspace.lm, replace(workspace.exp.engine, decode="eager"))
    steered, prompt = (of(workspace, engine, sites) for of in (steered_tokens, prompt_tokens))
    fits = []
    for sae in saes:
        preemption.check()
        fits.append(SAEFit(sae.layer, fit_on(sae, steered), fit_on(sae, prompt)))
    return fits


def store_fits(workspace: Workspace) -> None:
    """Measure how those of its SAEs fit whose fit isn't in stage 1's store, in one pass."""
    home, saes = workspace.warmup_home, [workspace.saes[layer] for layer in sorted(workspace.saes)]
    with workspace.engine.alone(), locked(home / ".lock"):
        missing = [sae for sae in saes if not _file(home, workspace, sae).exists()]
        if missing:
            for sae, fit in zip(missing, measured(workspace, missing), strict=True):
                write_json(_file(home, workspace, sae), asdict(fit))


def fits_of(workspace: Workspace) -> dict[int, SAEFit]:
    """How its SAEs fit its training split, by layer, from stage 1's store; the result is told
    of those that don't. Measured now where they aren't there."""
    store_fits(workspace)
    home = workspace.warmup_home
    fits = {
        layer: _load(_file(home, workspace, sae)) for layer, sae in sorted(workspace.saes.items())
    }
    for message in warnings(fits.values()):
        workspace.warn(message)
    return fits


def _file(home: Path, workspace: Workspace, sae: LayerSAE) -> Path:
    """Beside the layer's statistics, named by all that the fit depends on."""
    of = [FORMAT, sae.hook_name, sae.centered, sae_digest(workspace.exp.sae, sae.layer)]
    return home / f"fit_{sae.layer}_{sae.digest}_{content_key(of)}.json"


def _load(path: Path) -> SAEFit:
    advice = "delete the file; it is measured anew"
    plain: dict[str, Any] = read_json(path, advice)
    try:
        return SAEFit.of(plain)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {advice}") from error
