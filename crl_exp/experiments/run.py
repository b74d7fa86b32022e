"""One experiment of whatever kind: its directory held, its model loaded, its result written."""

from __future__ import annotations

import logging
import resource
from importlib.metadata import version
from typing import Any

import torch
from omegaconf import DictConfig

from crl_exp.config.errors import UserError
from crl_exp.config.files import defined
from crl_exp.experiments import config as configs
from crl_exp.experiments.config import Experiment
from crl_exp.experiments.fed import note_data
from crl_exp.experiments.inputs import hub_commits, inputs_of
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
from crl_exp.runs.result import write_by_layer
from crl_exp.runs.status import RETRIED, HeldError
from crl_exp.tracking.live import Tracker

log = logging.getLogger(__name__)
VERSIONS = ("crl_exp", "torch", "transformers", "sae-lens", "mlflow", "hydra-core")


class FinishedError(UserError):
    """The run asked for is finished already. result: what its result.json holds."""

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


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
    Raises `UserError` for whatever the user can mend (`FinishedError`: it holds the result); asked
    to end early, `Preempted`.
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
                _already(run, skip_finished, done)
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


def _already(run: RunDirectory, skip_finished: bool, done: dict[str, Any]) -> None:
    if run.status().get("state") != "done":
        run.set_status("done")  # killed between its result and its status
    if not skip_finished:
        raise FinishedError(
            f"this run is already finished: {run.result_path}. "
            "Add resume=force to run it again from the start",
            done,
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
        if result.get("series"):
            write_by_layer(run.path, result)
        write_json(run.result_path, result)
        run.clear_answers()
    return result


def _run(exp: Experiment, layers: list[int], run: RunDirectory, place: RunHost) -> dict[str, Any]:
    with run.progress.timed("load"):
        workspace = RunWorkspace(exp, layers, run, place.engine)
        workspace.before_statistics = lambda: place.warming_up(workspace)
        preemption.check()
        workspace.ready_to_score()
    if commits := hub_commits(exp, layers):
        workspace.note("hub_commits", commits)
    noted = note_data(run, workspace.splits, workspace.lm, workspace.fed)
    found = exp.experiment.run(workspace).plain()
    seconds = {phase: run.progress.seconds.get(phase, 0.0) for phase in PHASES}
    return {
        **_identity(workspace),
        **noted,
        **found,
        "notes": {**workspace.notes, **exp.task.told()},
        "warnings": workspace.warnings,
        "seconds": seconds,
        "choices": workspace.tried.choices(),
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": {name: version(name) for name in VERSIONS},
    }


def _identity(workspace: RunWorkspace) -> dict[str, Any]:
    """What a result is a result of."""
    exp = workspace.exp
    of_sae = {"sae": exp.sae.name, "dictionary": exp.sae.dictionary} if exp.reads("sae") else {}
    return {
        "run_key": workspace.run.key,
        "sweep": exp.sweep_name,
        **exp.experiment.called(exp),
        "model": exp.model.name,
        **of_sae,
        "task": exp.task.name,
        "layers": workspace.layers,
        "seed": exp.seed,
        "n": len(workspace.splits.test),
        "scorer": exp.task.scorer_name,
        "data_digest": workspace.splits.digest(),
    }


def peak_memory_bytes() -> int:
    """Peak of this process so far: on CUDA the allocator's, else the resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
