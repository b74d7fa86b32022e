"""`crl_exp.load_run`: a finished run that answers again, from wherever one is.

Nothing is ever written into its folder, nor is a lock taken: it may lie on a read-only disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from omegaconf import DictConfig

from crl_exp.config.errors import UserError
from crl_exp.config.files import home, read_json
from crl_exp.config.keys import anchored, frozen_config
from crl_exp.experiments import config as configs
from crl_exp.experiments.config import Experiment
from crl_exp.experiments.fed import options_for
from crl_exp.experiments.shared import layer_sae, shared_model
from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.generation.engine import Engine
from crl_exp.generation.model_check import checked
from crl_exp.generation.results import Job
from crl_exp.models.choice import ItemOptions, Options
from crl_exp.models.language_model import LanguageModel, load_model
from crl_exp.runs.checkpoints import read_state
from crl_exp.runs.inputs import INPUTS, sae_digest
from crl_exp.runs.records import RUN_KEY
from crl_exp.runs.status import RunStatus
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.controllers.fixed import FixedFeatures, Steer
from crl_exp.tasks.base import Task

FILES = ("result.json", "features.json", "items.parquet", "interventions.parquet", "journal.jsonl",
         "config.yaml")  # fmt: skip
"""What is worth reading of a run that can't answer."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run. Model and SAEs are loaded when it is first asked to answer.

    config: as it was frozen. result, features: what result.json and features.json hold.
    exp: the config as objects, its paths absolute.
    """

    path: Path
    config: DictConfig = field(repr=False)
    result: dict[str, Any] = field(repr=False)
    features: dict[str, Any] = field(repr=False)
    exp: Experiment = field(repr=False)

    def generate(self, prompts: Sequence[str]) -> list[str]:
        """Answers to these prompts, steered as the run's test items were.

        prompts: user turns; the chat template, the options and the length of an answer are those of
            the run's task (`task.chat_template`, `task.choices`, `task.max_new_tokens`).
        Raises `UserError` where model or SAEs can't be had or are others than they were, and for a
        method whose runs don't keep what they answered by.
        """
        return self._answers(self.controller, prompts)

    def unsteered(self, prompts: Sequence[str]) -> list[str]:
        """Answers of the model as it is, to prompts as `generate` takes them."""
        return self._answers(Unsteered(), prompts)

    @property
    def task(self) -> Task:
        """The run's task; `task.splits()` draws its items again."""
        return self.exp.task

    @cached_property
    def controller(self) -> Controller:
        """What the run steered by. Raises `UserError` as `generate` does."""
        with _still_readable(self.path):
            if not self.exp.experiment.steers:
                raise UserError(
                    f"{self.path} is an analysis (experiment={self.exp.experiment.name}), which "
                    "steers nothing"
                )
            return self.exp.method.restored(self)

    def _answers(self, controller: Controller, prompts: Sequence[str]) -> list[str]:
        if isinstance(prompts, str):
            raise UserError("prompts is one text: give a list of texts, as in [prompt]")
        if not prompts:
            return []
        ids = [self.lm.prompt_ids(prompt, self.task.chat_template) for prompt in prompts]
        return self.engine.generate(
            self.engine.read(ids), [Job(controller, range(len(ids)))], self.task.max_new_tokens,
            self.options, stop=self.task.stop_strings,
        )[0].texts  # fmt: skip

    # --- what its method asks for (`crl_exp.steering.kept_run.KeptRun`) ---

    @property
    def lm(self) -> LanguageModel:
        """The model that it ran on, kept by the process.

        Raises `UserError` where it can't be had, or isn't the same.
        """
        with _still_readable(self.path):
            lm = shared_model(asdict(self.exp.model), lambda: checked(load_model(self.exp.model)))
            if lm.fingerprint() != self.result.get("weights", lm.fingerprint()):
                raise UserError(
                    f"model.path={self.exp.model.path}: {lm.name} has other weights than the one "
                    f"that {self.path} ran on"
                )
        return lm

    def sae(self, layer: int) -> LayerSAE:
        with _still_readable(self.path):
            noted = read_json(self.path / INPUTS, "it can't be read") or {}
            then = noted.get(f"sae.folder={self.config.sae.folder}, layer {layer}")
            if then is not None and sae_digest(self.exp.sae, layer) != then:
                raise UserError(
                    f"sae.folder={self.exp.sae.folder}: the SAE of layer {layer} is another than "
                    f"the one that {self.path} ran on"
                )
            return layer_sae(self.exp.sae, layer, self.lm, asdict(self.exp.model), self.exp.seed)

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.lm, self.exp.engine)

    @cached_property
    def options(self) -> Options | ItemOptions | None:
        return options_for(self.task, self.lm)

    @property
    def n_tokens(self) -> int:
        return self.task.max_new_tokens if self.options is None else self.options.longest

    @property
    def notes(self) -> dict[str, Any]:
        return self.result["notes"]

    def fixed(self) -> Controller:
        rows = [
            Steer(int(layer), one["feature"], one["coefficient"])
            for layer, found in self.features.items()
            for one in found.get("chosen") or []
        ]
        steers = rows or list(self._first_token())
        saes = {layer: self.sae(layer) for layer in sorted({steer.layer for steer in steers})}
        return FixedFeatures(steers, saes, self.exp.decay) if steers else Unsteered()

    def _first_token(self) -> Iterator[Steer]:
        """What was added at each answer's first token, where features.json doesn't say."""
        path = self.path / "interventions.parquet"
        if not any(found["used"] for found in self.features.values()):
            return  # nothing was added
        if not path.exists():
            raise UserError(f"{self.path}: its features.json doesn't say which coefficients it "
                            f"chose, and {path.name} isn't there")  # fmt: skip
        columns = ["layer", "features", "coefficients"]
        table = pq.read_table(path, columns=columns, filters=[("token_index", "==", 0)])
        by_layer: dict[int, set[tuple]] = {}
        for row in table.to_pylist():
            added = tuple(zip(row["features"], row["coefficients"], strict=True))
            by_layer.setdefault(row["layer"], set()).add(added)
        for layer, seen in sorted(by_layer.items()):
            if len(seen) > 1:
                raise UserError(
                    f"{self.path}: it added different features to different items, and doesn't "
                    "keep by which rule, so it can't answer again"
                )
            for feature, coefficient in seen.pop():
                yield Steer(layer, feature, coefficient)

    def training(self) -> dict[str, Any]:
        places = [self.path, *(self.path / f"layer_{la}" for la in self.result["layers"])]
        path = next((p for place in places if (p := place / "checkpoint.pt").exists()), None)
        if path is None:
            raise UserError(
                f"{self.path}: its checkpoint.pt, which holds the policy, isn't there, so it can't "
                "answer again"
            )
        state = read_state(path, self.path.name, "its policy can't be taken from there")
        if state is None:
            raise UserError(f"{path} is damaged, so the policy is lost and it can't answer again")
        if state["step"] < self.exp.algorithm.n_updates or state["unvalidated"]:
            raise UserError(f"{path} is not of the end of training, so it can't answer again")
        return state


def load_run(path: str | Path, device: str | None = None) -> FinishedRun:
    """A finished run from its folder, `outputs/SWEEP/RUN_KEY`; nothing is written there.

    device: in place of the one that it ran on (`model.device`), or of those (`model.device_map`).
    Raises `UserError` for a folder that is no run or isn't finished, and for one of another version
    of crl_exp that this one doesn't understand.
    """
    folder = home(path, "path").absolute()
    _check_folder(folder)
    with _still_readable(folder):
        RunStatus(folder, from_scratch=False).check_format()
        result = read_json(folder / "result.json", "it can't be read")
        if result is None:
            raise UserError(f"{folder} isn't finished: {_state(folder)}, and has no result.json")
        config = frozen_config(folder)
        features = read_json(folder / "features.json", "it can't be read") or {}
        here = anchored(config, folder)
        if device is not None:
            here.model.device, here.model.device_map = device, None
        exp = configs.experiment(here)
    return FinishedRun(folder, config, result, features, exp)


def _check_folder(folder: Path) -> None:
    """Raise `UserError` where it is no run's."""
    if (folder / "config.yaml").is_file() and RUN_KEY.fullmatch(folder.name):
        return
    runs = sorted(p.parent.name for p in folder.glob("*/config.yaml"))
    if runs:
        raise UserError(
            f"{folder} is a sweep: give the folder of one of its {len(runs)} runs, such as "
            f"{folder / runs[0]}; crl_exp.read_sweep reads them all"
        )
    why = "it has no config.yaml" if folder.is_dir() else "there is no such folder"
    if (folder / "config.yaml").is_file():
        why = "its name isn't a run's key"
    raise UserError(f"{folder} is no run: {why}; give outputs/SWEEP/RUN_KEY")


def _state(folder: Path) -> str:
    """What an unfinished run says of itself, in a line."""
    status = read_json(folder / "status.json", "it can't be read") or {}
    error = str(status.get("error") or "").strip().split("\n")[0]
    return f"it is {status.get('state', 'not begun')}{f' ({error})' if error else ''}"


@contextmanager
def _still_readable(folder: Path) -> Iterator[None]:
    """A fault of the user's in the block ends in what of the run can be read all the same."""
    try:
        yield
    except _SaidError:
        raise
    except UserError as error:
        there = [name for name in FILES if (folder / name).is_file()]
        said = "; ".join(line.strip() for line in str(error).splitlines())
        raise _SaidError(f"{said}. {', '.join(there)} can still be read") from error


class _SaidError(UserError):
    """One that says already what can be read."""
