"""One experiment: load, warm up, train, evaluate, write the result."""

from __future__ import annotations

import logging
import resource
from importlib.metadata import version
from typing import Any

import torch
from omegaconf import DictConfig

from crl_exp.analysis.sae_fit import SAEFit, by_layer
from crl_exp.analysis.winners_curse import warnings
from crl_exp.config.errors import UserError
from crl_exp.config.files import defined
from crl_exp.experiments import config as configs
from crl_exp.experiments.config import Experiment
from crl_exp.experiments.fed import note_data
from crl_exp.experiments.inputs import inputs_of
from crl_exp.experiments.kinds.steering import evaluate
from crl_exp.experiments.shared import shared_splits
from crl_exp.experiments.workspace import RunWorkspace
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.models.language_model import LanguageModel
from crl_exp.runs import preemption
from crl_exp.runs.code_state import note_code
from crl_exp.runs.directory import RunDirectory, write_json
from crl_exp.runs.heartbeat import PHASES, beating
from crl_exp.runs.inputs import changed
from crl_exp.runs.records import Record
from crl_exp.runs.status import RETRIED, HeldError
from crl_exp.steering.answerer import Answering
from crl_exp.steering.controllers.fixed import FixedFeatures
from crl_exp.steering.feature_statistics.fit import fits_of
from crl_exp.steering.feature_statistics.store import LayerStatistics
from crl_exp.steering.stages.effects import cautions
from crl_exp.tracking.live import Tracker

log = logging.getLogger(__name__)
VERSIONS = ("crl_exp", "torch", "transformers", "sae-lens", "mlflow", "hydra-core")


class RunHost:
    """Where a run takes place: in this process by itself. `crl_exp.experiments.packing` has others.

    packed: runs that share the time.
    """

    packed = 1

    def engine(self, lm: LanguageModel, config: EngineConfig) -> Engine:
        return Engine(lm, config)

    def begun(self, run: RunDirectory) -> None:
        """The run is recorded as running; nothing is loaded yet."""

    def warming_up(self, workspace: RunWorkspace) -> None:
        """The run's stage 1 comes next."""


def run_experiment(
    config: DictConfig, skip_finished: bool, place: RunHost | None = None
) -> dict[str, Any] | None:
    """Run one composed config in its run directory; returns its result.

    skip_finished: a finished run's result is returned (in a sweep) instead of being an error.
    place: in a pack of runs; see `crl_exp.experiments.packing`.
    Returns None where the run is left alone: with resume=retry unless it failed, was lost or
    cancelled, and in a sweep where another process has it.
    Raises `UserError` for whatever the user can mend; asked to end early, `Preempted`.
    """
    exp = configs.experiment(config)
    layers = configs.validate(exp)
    run = RunDirectory(config)
    if exp.resume == "retry" and (state := Record(run.path).state) not in RETRIED:
        log.info("%s, left alone by resume=retry: %s", state, run.path)
        return None
    if run.from_scratch or not run.result_path.exists():
        try:
            _check_machine(exp)
        except UserError:
            if run.path.exists():
                refuse_changed_inputs(exp, layers, run)  # says more of a file that was edited
            raise
    try:
        with preemption.guard(), run.held():
            # Only now: until here another process may have been at it.
            refuse_changed_inputs(exp, layers, run)
            done = None if run.from_scratch else run.result()
            if done is not None:
                _already(run, skip_finished)
                return done
            return _attempt(exp, layers, run, place or RunHost())
    except HeldError as error:
        if not skip_finished:
            raise
        log.info("left alone: %s", error)
        return None


def _check_machine(exp: Experiment) -> None:
    """What only the machine that runs it can tell, before there is a run directory.

    Raises `UserError` for a device that isn't here, and data that isn't to be had or doesn't do.
    """
    if found := exp.model.machine_faults():
        raise UserError("\n".join(found))
    shared_splits(exp.task)


def refuse_changed_inputs(exp: Experiment, layers: list[int], run: RunDirectory) -> None:
    """Raise `UserError` where the run was begun with other files than lie there now; note what does
    in `run.inputs`."""
    run.inputs = inputs_of(exp, layers)
    if run.from_scratch or not run.path.exists():
        return
    if fault := changed(run.path, run.inputs, lambda: shared_splits(exp.task)):
        raise UserError(fault)


def _already(run: RunDirectory, skip_finished: bool) -> None:
    if run.status().get("state") != "done":
        run.set_status("done")  # killed between its result and its status
    if not skip_finished:
        raise UserError(
            f"this run is already finished: {run.result_path}. "
            "Add resume=force to run it again from the start"
        )
    run.renumber()
    log.info("already finished, skipped: %s", run.path)


def _attempt(
    exp: Experiment, layers: list[int], run: RunDirectory, place: RunHost
) -> dict[str, Any]:
    # The tracker outlives the directory's status: a failed run belongs in MLflow too.
    with (
        Tracker(run, exp.tracking) as tracker,
        run.recorded(),
        beating(run.path / "heartbeat.json", run.progress),
    ):
        code = note_code(run.path)
        tracker.start()
        run.progress.packed = max(run.progress.packed, place.packed)
        place.begun(run)
        result = _run(exp, layers, run, place) | code | {"packed": run.progress.packed}
        result = defined(result)
        write_json(run.result_path, result)
        run.clear_answers()
    return result


def _run(exp: Experiment, layers: list[int], run: RunDirectory, place: RunHost) -> dict[str, Any]:
    timed = run.progress.timed
    with timed("load"):
        workspace = RunWorkspace(exp, layers, run, place.engine)
        for caution in cautions(exp, workspace.n_tokens):
            workspace.warn(caution)
        preemption.check()
    noted = note_data(run, workspace.splits, workspace.lm, workspace.fed)
    fits: dict[int, SAEFit] = {}
    with timed("warmup"):
        if exp.method.needs_statistics:
            place.warming_up(workspace)
            workspace.statistics()
            fits = fits_of(workspace)
    with timed("train"):
        answerer, layers = prepared(workspace)
        choices = workspace.tried.choices()
        for few in warnings(choices):
            workspace.warn(few)
    with timed("evaluate"):
        figures, used = evaluate(workspace, answerer)
    write_json(run.path / "features.json", _features(workspace, used, answerer))
    result = _identity(exp, layers, run, workspace) | noted | figures
    if fits:
        result["by_layer"] = by_layer(fits)
    seconds = {phase: run.progress.seconds[phase] for phase in PHASES}
    result |= {"notes": workspace.notes, "warnings": workspace.warnings, "seconds": seconds}
    result["choices"] = choices
    result["peak_memory_bytes"] = peak_memory_bytes()
    result["versions"] = {name: version(name) for name in VERSIONS}
    return result


def prepared(workspace: RunWorkspace) -> tuple[Answering, list[int]]:
    """What the method found, and the layers that it reads or steers."""
    if workspace.exp.method.uses_layers:
        return workspace.exp.layers.prepare(workspace)
    return workspace.exp.method.prepare(workspace), []


def _identity(
    exp: Experiment, layers: list[int], run: RunDirectory, workspace: RunWorkspace
) -> dict[str, Any]:
    """What a result is a result of."""
    return {
        "run_key": run.key,
        "sweep": exp.sweep_name,
        "method": exp.method.name,
        "label": exp.method.label or exp.method.name,
        "control": exp.method.control or exp.sae.control or exp.task.shuffle_labels,
        "model": exp.model.name,
        "sae": exp.sae.name,
        "dictionary": exp.sae.dictionary,
        "task": exp.task.name,
        "layers": layers,
        "seed": exp.seed,
        "scorer": exp.task.scorer_name,
        "data_digest": workspace.splits.digest(),
    }


def _features(
    workspace: RunWorkspace, used: dict[int, dict[int, dict[str, float]]], answerer: Answering
) -> dict[str, Any]:
    """features.json: by layer, the best found in stage 1 and those added on the test set.

    chosen: where they are fixed, with the coefficients that they are added with.
    """
    layers: dict[str, Any] = {}
    chosen: dict[int, list[dict[str, Any]]] = {}
    for steer in answerer.steers if isinstance(answerer, FixedFeatures) else []:
        one = {"feature": steer.feature_idx, "coefficient": steer.coefficient}
        chosen.setdefault(steer.layer, []).append(one)
    measured = workspace.statistics() if workspace.exp.method.needs_statistics else {}
    for layer in sorted({*measured, *used, *chosen}):
        rows = used.get(layer, {})
        if layer in measured:
            layers[str(layer)] = _measured_features(workspace, layer, measured[layer], rows)
        else:
            sae = workspace.saes[layer]
            layers[str(layer)] = {"n": None, "allowed": None, "found": [], "used": [
                {"feature": feature, "neuronpedia": sae.link(feature), **more}
                for feature, more in rows.items()
            ]}  # fmt: skip
        if layer in chosen:
            layers[str(layer)]["chosen"] = chosen[layer]
    return layers


def _measured_features(
    workspace: RunWorkspace,
    layer: int,
    statistics: LayerStatistics,
    used: dict[int, dict[str, float]],
) -> dict[str, Any]:
    coefficient_F = workspace.coefficients(layer).cpu()
    columns = {**statistics.by_feature, "coefficient": coefficient_F}

    def row(feature: int, more: dict) -> dict[str, Any]:
        values = {name: float(columns[name][feature]) for name in FEATURE_COLUMNS}
        sign = 1 if values["correlation"] >= 0 else -1
        link = workspace.saes[layer].link(feature)
        return {"feature": feature, **values, "sign": sign, "neuronpedia": link, **more}

    best = statistics.best(workspace.exp.warmup.min_frequency, workspace.exp.warmup.keep)
    return {
        "n": statistics.n,
        "allowed": len(statistics.allowed(workspace.exp.warmup.min_frequency)),
        "found": [row(feature, {}) for feature in best],
        "used": [row(feature, more) for feature, more in used.items()],
    }


FEATURE_COLUMNS = (
    "correlation",
    "score",
    "coefficient",
    "frequency",
    "frequency_rewarded",
    "frequency_unrewarded",
)


def peak_memory_bytes() -> int:
    """Peak of this process so far: on CUDA the allocator's, else the resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
