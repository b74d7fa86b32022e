"""`python -m crl_exp prefetch +sweep=NAME …`: what a sweep loads, brought into the local caches.

For clusters whose compute nodes are offline: run it on the login node, with HF_HOME on a file
system that the nodes see. What lies on disk is looked at, not copied.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from crl_exp.config.errors import UserError
from crl_exp.config.files import home
from crl_exp.config.keys import content_key
from crl_exp.config.machine.hub import hub_trouble
from crl_exp.experiments import config as configs
from crl_exp.experiments.config import Experiment, Known
from crl_exp.launcher.assets.feature_labels import UnreachableError, fetch_labels
from crl_exp.launcher.command_line import people_errors
from crl_exp.launcher.commands.typed import typed_sweep
from crl_exp.launcher.planning.compose import Composer
from crl_exp.models.config import OFFLINE, ModelConfig
from crl_exp.saes.config import SAEConfig

# Of a model's repository: not its weights in other frameworks' formats.
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def main(argv: list[str]) -> int:
    """Returns 1 where something could not be had; all of it is named."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp prefetch",
        description="Download the models, SAEs, data sets and scorers of a sweep, so that its runs "
        "need no network (HF_HUB_OFFLINE=1).",
        usage="python -m crl_exp prefetch [OVERRIDE …]    as after `python launch.py -m`",
    )
    parser.add_argument("overrides", nargs="*")
    typed = parser.parse_args(argv).overrides
    with people_errors(), typed_sweep(typed) as (loader, master, jobs):
        composer, known = Composer(loader, master), Known()
        points = [configs.experiment(composer.config(job)[0], known) for job in jobs]
    faults = fetch(points)
    for fault in faults:
        print(f"missing: {fault}")
    return 1 if faults else 0


def fetch(points: Sequence[Experiment]) -> list[str]:
    """Fetch what these experiments load, each thing once; returns what could not be had."""
    faults: dict[str, str] = {}
    seen: set[str] = set()

    def once(of: object, get: Callable[[], str]) -> bool:
        """Whether it could be had."""
        key = content_key(of)
        if key not in seen:
            seen.add(key)
            try:
                if told := get():
                    print(told, flush=True)
            except UserError as error:
                faults[key] = str(error)
        return key not in faults

    for exp in points:
        model = asdict(exp.model)
        once(["task", asdict(exp.task)], lambda e=exp: fetch_task(e))
        there = once(["model", model], lambda e=exp: fetch_model(e.model))
        # Which layers are steered depends on the model. A baseline at an SAE's site asks for its
        # hook, though not for its weights.
        if there and "layers" in exp.needs and exp.reads("sae") and not exp.sae.absent:
            saes = [model, asdict(exp.sae), asdict(exp.layers)]
            if once(["saes", *saes], lambda e=exp: fetch_saes(e)):
                once(["labels", *saes], lambda e=exp: fetch_their_labels(e))
    return list(faults.values())


def fetch_model(model: ModelConfig) -> str:
    """Returns what was done. Raises `UserError` where the model can't be had."""
    path = model.local_path()
    if home(path, "model.path").is_dir():
        return f"model {model.name}: on disk, {path}"
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(path, revision=model.revision, allow_patterns=FILES)
    except (OSError, ValueError) as error:  # the hub's and the network's errors are OSErrors
        why = hub_trouble(error, path) or str(error).splitlines()[0]
        raise UserError(f"model.path={model.path}: {why}. {OFFLINE}") from error
    if not any(Path(folder).glob("*.safetensors")):
        raise UserError(
            f"model.path={model.path}: its repository has no *.safetensors weights. Pickled ones "
            "aren't loaded: convert them at https://huggingface.co/spaces/safetensors/convert and "
            "set model.revision=refs/pr/N, the number that it tells"
        )
    return f"model {model.name}: {folder}"


def fetch_saes(exp: Experiment) -> str:
    """The SAEs of the steered layers. Raises `UserError` where one can't be had."""
    layers = configs.with_sae(exp, configs.validate(exp))
    if exp.sae.folder is not None:
        missing = [n for n in layers if not any(exp.sae.path(n).glob("*.safetensors"))]
        if missing:
            raise UserError(f"sae.folder={exp.sae.folder}: no weights for the layers {missing}")
        return f"SAEs {exp.sae.name}, layers {layers}: on disk, {exp.sae.root()}"
    for layer in layers:
        _fetch_sae(exp.sae, layer)
    return f"SAEs {exp.sae.name}, layers {layers}: in the hub's cache"


def fetch_their_labels(exp: Experiment) -> str:
    """What Neuronpedia calls their features, for reports. Where it can't be had no run lacks it, so
    that it is told and is no fault."""
    layers = configs.with_sae(exp, configs.validate(exp))
    sources = {exp.sae.metadata(layer).neuronpedia_id for layer in layers} - {None}
    told = []
    for source in sorted(map(str, sources)):
        try:
            told.append(f"labels {source}: of {fetch_labels(source):,} features")
        except UserError as error:
            told.append(f"labels {source}: none, reports go without ({error})")
            if isinstance(error, UnreachableError):
                break
    return "\n".join(told)


def _fetch_sae(sae: SAEConfig, layer: int) -> None:
    from sae_lens import SAE

    try:
        SAE.from_pretrained(str(sae.release), sae.sae_id(layer), device="cpu")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(sae.cannot_load(layer, error)) from error


def fetch_task(exp: Experiment) -> str:
    """The data, split as the runs will, and the scorer. Raises `UserError` for what is missing."""
    splits = exp.task.splits()
    sizes = ", ".join(f"{name} {len(items)}" for name, items in splits.named().items())
    return f"task {exp.task.name} ({exp.task.scorer_name}): {sizes}"
