"""What tells runs apart: the key of a config, and the config as it is frozen in a run directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crl_exp.config import compatibility, own_code
from crl_exp.config.errors import UserError
from crl_exp.config.files import content_key, read_json, write_atomic
from crl_exp.config.sections import target_class

# Where a run is written and logged, how it is asked for, and where a report puts it, don't change
# what it computes.
NOT_IN_KEY = (
    "hydra", "output_dir", "sweep_name", "tracking", "resume", "checkpoint", "rung", "own_code",
)  # fmt: skip
SOURCE = "function_source"
"""Key of a task that has the digest of the source of the function that scores."""
DOCUMENTS = "documents"
"""Key of a task that has the digest of what its own tool for data read."""
RESUME = ("new", "retry", "force")
EVERY_KIND = ("experiment", "seed", "model", "task", *NOT_IN_KEY)
"""What every kind of experiment reads, or the frame that runs it."""


def run_key(config: DictConfig) -> str:
    """Hash of the resolved config without paths, tracking and other things that don't matter, and
    without the sections that its kind of experiment doesn't read.

    Raises `UserError` where `experiment` names no kind.
    """
    own_code.use(config)
    return key_of(settled(plain_of(config)))


def key_of(plain: dict[str, Any]) -> str:
    """`run_key` of a config that was resolved and settled already."""
    kept = {k: v for k, v in sections_read(plain).items() if k not in NOT_IN_KEY}
    return content_key(compatibility.hashed(kept))


def row_key(plain: dict[str, Any]) -> str:
    """Equal for resolved configs that differ in nothing that a key holds but their seed."""
    return content_key({k: v for k, v in plain.items() if k not in (*NOT_IN_KEY, "seed")})


def plain_of(config: DictConfig) -> dict[str, Any]:
    """A config as plain values, resolved."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return plain


def settled(plain: dict[str, Any]) -> dict[str, Any]:
    """A resolved config with what its task finds in files in the place of what asks for it: sizes
    that are shares of a file, in items, and the digests of a function's source, of a model that
    scores, and of documents.

    So a key is of what is read, and a frozen config, which has them, needs no file for it.

    Raises `UserError` where such a file isn't as it should be.
    """
    task = plain.get("task")
    if not isinstance(task, dict) or not _asks_files(task):
        return plain
    cls = target_class(str(task.get("_target_")), "task", object)
    settle = getattr(cls, "settled", None)  # of the tasks that have files of their own
    return plain if settle is None else {**plain, "task": {**task, **settle(task)}}


def settle(config: DictConfig) -> dict[str, Any]:
    """Make a config `settled`, having its `own_code` on the path; returns what was found, by key of
    the task. A function that lies in the working directory has that noted in `own_code`.

    Raises `UserError` as `settled` does.
    """
    task = config.get("task")
    if not isinstance(task, DictConfig) or task._is_none() or task._is_missing():
        return {}
    own_code.use(config)
    plain: Any = OmegaConf.to_container(task, resolve=True)
    now = settled({"task": plain})["task"]
    found = {key: value for key, value in now.items() if key not in plain or plain[key] != value}
    for key, value in found.items():
        OmegaConf.update(config, f"task.{key}", value)
    if SOURCE in found:
        name = str(plain["function"])
        module, _, _ = name.rpartition(".")
        own_code.keep_working_directory(config, module, f"task.function={name}")
    return found


def _asks_files(task: dict[str, Any]) -> bool:
    """Whether a task's section may leave something to its files."""
    if "???" in task.values():
        return False  # what is missing is told first
    sizes = [task[name] for name in ("n_train", "n_validation", "n_test") if name in task]
    is_open = any(size is None or isinstance(size, float) for size in sizes)
    if DOCUMENTS in task:
        return is_open or task[DOCUMENTS] is None
    source = SOURCE in task and bool(task.get("function")) and not task[SOURCE]
    return is_open or source or _asks_a_model(task)


def _asks_a_model(task: dict[str, Any]) -> bool:
    """Whether answers are scored by a model whose files' digest isn't known yet."""
    model = task.get("preference_model") if task.get("scorer") == "preference_model" else None
    return isinstance(model, dict) and bool(model.get("path")) and not model.get("digest")


def sections_read(plain: dict[str, Any]) -> dict[str, Any]:
    """A resolved config without the sections that its kind of experiment doesn't read."""
    kind = plain.get("experiment")
    if kind is None or compatibility.is_steering(kind):
        return plain  # which reads all; its class needn't be loaded for it
    target = str(kind.get("_target_", ""))
    reads = getattr(target_class(target, "experiment", object), "reads", None)
    if reads is None:
        raise UserError(f"experiment._target_={target}: is no kind of experiment")
    return {k: v for k, v in plain.items() if k in reads or k in EVERY_KIND}


def filed_under(config: Mapping[Any, Any]) -> str:
    """What the result of a config is filed under: the name of its method, or of its kind of
    experiment where that has none."""
    kind = config.get("experiment")
    if kind is None or compatibility.is_steering(kind):
        return str(config["method"]["name"])
    return str(kind["name"])


def frozen_config(path: Path) -> DictConfig:
    """The config frozen in a run directory, for running it from where the directory lies now.

    One frozen by an earlier version means what it meant then (`compatibility`).
    Raises `UserError` where there is none, where it is damaged or was changed since.
    """
    path = path.absolute()
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is no run directory: it has no config.yaml")
    config = read_config(path / "config.yaml")
    config.sweep_name, config.output_dir = path.parent.name, str(path.parent.parent)
    compatibility.fill_missing(config)
    if run_key(config) != path.name:
        raise UserError(
            f"{path}/config.yaml belongs to the run {run_key(config)}: it was changed by hand or "
            "written by another version. Launch the sweep again; it freezes the config anew"
        )
    return config


def read_config(path: Path) -> DictConfig:
    """A config as it was frozen. Raises `UserError` for a damaged file."""
    try:
        config = OmegaConf.load(path)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        why = str(error).splitlines()[0]
    else:
        if isinstance(config, DictConfig) and not config._is_none() and len(config):
            return config
        why = "it holds no keys"
    raise UserError(
        f"{path} is damaged ({why}): launch the sweep, or type the run's line, again; it writes "
        "the config anew"
    )


def freeze(config: DictConfig, path: Path) -> None:
    """Write the config that a run directory's run is started from, resolved, of it what its kind of
    experiment reads.

    It says resume=new: however often a job is started from it, it goes on.
    """
    whole: Any = OmegaConf.to_container(config, resolve=True)
    plain = sections_read(settled(whole))
    plain.pop("hydra", None)
    plain["resume"] = "new"
    write_atomic(path, OmegaConf.to_yaml(OmegaConf.create(plain)))


NAMES_A_PLACE = (
    "model.path", "sae.folder", "task.path", "task.lm_eval_task", "method.path",
    "task.preference_model.path",
)  # fmt: skip
"""Keys whose relative paths are meant from where the run was launched."""


def anchored(config: DictConfig, folder: Path) -> DictConfig:
    """A run's config with absolute paths where a relative one leads to something.

    folder: the run's, wherever it lies now.
    """
    made = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    assert isinstance(made, DictConfig)
    places = list(_launched_from(folder))
    for key in NAMES_A_PLACE:
        path = OmegaConf.select(made, key)
        if isinstance(path, str):
            OmegaConf.update(made, key, _found(path, places))
    files = OmegaConf.select(made, "task.data_files")
    if files is not None:
        made.task.data_files = _each(OmegaConf.to_container(made)["task"]["data_files"], places)  # type: ignore[index, call-overload]
    return made


def _each(files: Any, places: Sequence[Path]) -> Any:
    """`task.data_files`: a text, a list of them, or these by split."""
    if isinstance(files, str):
        return _found(files, places)
    if isinstance(files, dict):
        return {split: _each(part, places) for split, part in files.items()}
    return [_each(one, places) for one in files]


def _found(path: str, places: Sequence[Path]) -> str:
    """Where a relative path lies; itself where it lies nowhere: a hub's id, or what is shipped."""
    if path.startswith("~") or Path(path).is_absolute():
        return path
    for place in places:
        if (place / path).exists() or any(True for _ in place.glob(path)):
            return str(place / path)
    return path


def _launched_from(folder: Path) -> Iterator[Path]:
    """Folders that a run's relative paths may be meant from, the likeliest first."""
    folder = folder.absolute()
    status = read_json(folder / "status.json", "it can't be read") or {}
    if status.get("cwd"):
        yield Path(status["cwd"])
    outputs = Path(str(read_config(folder / "config.yaml").get("output_dir", "")))
    # A folder that was moved as a whole keeps what lies beside its outputs.
    if (
        not outputs.is_absolute()
        and folder.parents[1].parts[-len(outputs.parts) :] == outputs.parts
    ):
        yield folder.parents[1 + len(outputs.parts)]
    yield Path.cwd()
