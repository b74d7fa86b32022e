"""Making an lm-eval task: where its data lies, and what is told where that can't be had."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from crl_exp.config.errors import UserError
from crl_exp.tasks.data.rows import KINDS, files_of


def files_instead(data_files: Any) -> dict[str, Any]:
    """`task.data_files` in the place of the task's data set."""
    if not isinstance(data_files, dict):
        raise UserError(
            f"task.data_files={data_files!r}: give a file for each split of the task's data, e.g. "
            "task.data_files={train:FILE.parquet,validation:FILE.parquet}"
        )
    files = {split: [str(path) for path in files_of(one)] for split, one in data_files.items()}
    kinds = {KINDS.get(Path(path).suffix.lower()) for part in files.values() for path in part}
    if len(kinds) != 1 or None in kinds:
        raise UserError(f"task.data_files: all must end in the same of {', '.join(KINDS)}")
    return {"dataset_path": kinds.pop(), "dataset_name": None,
            "dataset_kwargs": {"data_files": files}}  # fmt: skip


def local_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """The task's own `data_files`: what isn't in the working directory is looked for beside the
    YAML file (`_folder`)."""
    kwargs = dict(config.get("dataset_kwargs") or {})
    folder = config.get("_folder")
    if folder is None or "data_files" not in kwargs:
        return {}

    def placed(files: Any) -> Any:
        if isinstance(files, dict):
            return {split: placed(one) for split, one in files.items()}
        if isinstance(files, list):
            return [placed(one) for one in files]
        beside = Path(folder) / str(files)
        return str(beside) if not Path(str(files)).exists() and beside.exists() else files

    return {"dataset_kwargs": {**kwargs, "data_files": placed(kwargs["data_files"])}}


def made(where: str, config: Mapping[str, Any]) -> Any:
    """lm-eval's task of a config, its data loaded. Raises `UserError` where that can't be had."""
    from datasets import config as of_datasets
    from datasets.exceptions import DatasetsError
    from lm_eval.api.task import ConfigurableTask

    # Else each reading of a local file is counted at Hugging Face.
    of_datasets.HF_UPDATE_DOWNLOAD_COUNTS = False
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    data = given.get("dataset_path")
    try:
        return ConfigurableTask(config=given)
    except UserError:
        raise
    except Exception as error:  # of the data, the network, the config, or a function of the task
        said = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
        if "scripts are no longer supported" in str(error):
            why = f"its data set {data} is a script, which datasets 4 and later don't run ({said})"
        elif isinstance(error, (DatasetsError, OSError)):
            why = f"can't load its data set {data} ({said})"
        else:
            raise UserError(f"{where}: lm-eval can't make this task ({said})") from error
        raise UserError(
            f"{where}: {why}. With a connection `python -m crl_exp prefetch …` fetches it; files "
            "with the same columns do as well: task.data_files={test:FILE.parquet,…} by split"
        ) from error


@contextmanager
def quick_and_quiet() -> Iterator[None]:
    """lm-eval compiles a template anew for each document, which takes longer than filling it in,
    and warns of figures that aren't taken from it."""
    from lm_eval import utils

    log, compiles = logging.getLogger("lm_eval"), utils.env.from_string
    before = log.level
    log.setLevel(logging.ERROR)
    utils.env.from_string = lru_cache(maxsize=64)(compiles)  # type: ignore[method-assign]
    try:
        yield
    finally:
        utils.env.from_string = compiles  # type: ignore[method-assign]
        log.setLevel(before)
