"""The files that an experiment reads, and what lies in them; `crl_exp.runs.inputs` compares."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from crl_exp.config import own_code
from crl_exp.config.files import home
from crl_exp.config.machine.hub import cached_commit
from crl_exp.experiments.config import Experiment, with_sae
from crl_exp.runs.inputs import Inputs, digest, folder_digest, sae_digest
from crl_exp.steering.feature_lists import list_file
from crl_exp.tasks.data.rows import files_of


def inputs_of(exp: Experiment, layers: list[int]) -> Inputs:
    """What the experiment would read now: the task's files, the folders of the model and of those
    that score, the SAEs of these layers, a list of features.

    Raises `UserError` where one can't be read.
    """
    found = task_inputs(exp.task) | scorer_inputs(exp.task) | class_inputs(exp)
    if not exp.model.path.startswith(("asset:", "tiny:")):  # those are what they are
        folder = home(exp.model.path, "model.path")
        if folder.is_dir():
            key = f"model.path={exp.model.path}"
            found[key] = folder_digest(folder, key)
    if isinstance(path := getattr(exp.method, "path", None), str):  # a list of features
        found[f"method.path={path}"] = digest([list_file(path)], "method.path")
    for layer in with_sae(exp, layers):
        if of_sae := sae_digest(exp.sae, layer):
            found[f"sae.folder={exp.sae.folder}, layer {layer}"] = of_sae
    return found


def hub_commits(exp: Experiment, layers: list[int]) -> dict[str, str]:
    """Of what of the model, the SAEs and the data comes from the hub, the commit that lies in its
    local cache, by the key of the config that names it; {} where nothing does, or none is known.

    Not compared: keys hold `revision`, and a run's result says what it was made with.
    """
    asked: list[tuple[str, str, str, str | None]] = []
    path = exp.model.path
    if not path.startswith(("asset:", "tiny:")) and not home(path, "model.path").is_dir():
        asked.append((f"model.path={path}", path, "model", exp.model.revision))
    if with_sae(exp, layers) and exp.sae.folder is None:
        asked.append((f"sae.release={exp.sae.release}", exp.sae.repo_id, "model", None))
    if getattr(exp.task, "scorer", None) == "preference_model":
        scorer: Any = getattr(exp.task, "preference_model")  # noqa: B009, of one kind of task
        if scorer.digest is None:  # of the hub
            key = f"task.preference_model.path={scorer.path}"
            asked.append((key, scorer.path, "model", scorer.revision))
    hub_id = getattr(exp.task, "hub_id", None)
    if isinstance(hub_id, str) and getattr(exp.task, "data_files", None) is None:
        revision = getattr(exp.task, "revision", None)
        asked.append((f"task.hub_id={hub_id}", hub_id, "dataset", revision))
    found = {key: cached_commit(*of) for key, *of in asked}  # type: ignore[arg-type]
    return {key: commit for key, commit in found.items() if commit is not None}


def task_inputs(task: Any) -> Inputs:
    """What lies in a task's own files; {} where it has none."""
    found: Inputs = {}
    if isinstance(path := getattr(task, "path", None), str):
        key = f"task.path={path}"
        found[key] = digest([home(path, "task.path")], key)
    if function := getattr(task, "function", None):
        key = f"task.function={function}"
        found[key] = own_code.source_digest(function.rpartition(".")[0], key)
    if (given := getattr(task, "data_files", None)) is not None:
        parts = given.values() if isinstance(given, dict) else [given]
        files = [file for part in parts for file in files_of(part)]
        key = f"task.data_files={given}"
        found[key] = digest(files, key)
    return found


def class_inputs(exp: Experiment) -> Inputs:
    """What lies in the modules of classes of the user's own; {} where all are this package's."""
    sections = [(f.name, type(getattr(exp, f.name))) for f in fields(exp)]
    own = [
        (f"{name}._target_", f"{cls.__module__}.{cls.__qualname__}")
        for name, cls in sections
        if own_code.holds(cls.__module__)
    ]
    return own_code.digests(own)


def scorer_inputs(task: Any) -> Inputs:
    """What lies in the folders of models that score a task's answers; {} where there are none."""
    found: Inputs = {}
    for name in ("classifier", "cross_encoder", "preference_model"):
        path = getattr(getattr(task, name, None), "path", None)
        if name == "preference_model" and getattr(task, "scorer", None) != name:
            continue
        if isinstance(path, str) and (folder := home(path, f"task.{name}.path")).is_dir():
            key = f"task.{name}.path={path}"
            found[key] = folder_digest(folder, key)
    return found
