"""Rows of a data set: from the Hugging Face hub, or from local files with the same columns.

`datasets` does the reading and honours HF_HUB_OFFLINE and HF_DATASETS_OFFLINE. Local files are
streamed, so that a file that changes is never read from an old copy in a cache, and nothing is
asked of the network for them.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.files import home
from crl_exp.tasks.data.files import json_line, users_text

KINDS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
ONE_FILE = "data_files"
HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""What a surrogate looks like in JSON, one of a pair or alone."""


@dataclass(frozen=True)
class Row:
    """One row. `where` names its place in messages."""

    where: str
    cells: dict[str, Any]

    def text(self, column: str) -> str:
        """A cell as text. Raises `UserError` where it is empty."""
        value = self.cells[column]
        if value is None or not str(value).strip():
            raise self.fault(column, "is empty")
        return str(value).strip()

    def cell(self, column: str) -> str:
        """A cell that may be empty, or whose column may be missing, as text."""
        value = self.cells.get(column)
        return "" if value is None else str(value).strip()

    def number(self, column: str, below: int) -> int:
        """A cell as a whole number from 0 up. Raises `UserError` where it isn't one `below`."""
        value = self.cells[column]
        try:
            number = int(str(value))
        except ValueError:
            number = -1
        if not 0 <= number < below:
            raise self.fault(column, f"is {value!r}, not a whole number from 0 to {below - 1}")
        return number

    def texts(self, column: str) -> list[str]:
        """A list of texts. Raises `UserError` where the cell holds something else."""
        value = self.json(column)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.fault(column, f"is {value!r}, not a list of texts")
        return [one.strip() for one in value]

    def json(self, column: str) -> Any:
        """A list or an object; in a CSV file it is written as JSON."""
        value = self.cells[column]
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise self.fault(
                column, f'holds {value[:60]!r}; write lists as JSON, e.g. ["a", "b"]'
            ) from error

    def fault(self, column: str, what: str) -> UserError:
        return UserError(f"{self.where}: column {column} {what}")


@dataclass(frozen=True)
class Source:
    """Where rows come from: a data set of the hub, or local files in its place.

    subsets: its configurations, all read (`None`: it has but one). data_files: `None`; a path or
    list of paths for everything; or a mapping from splits of the data set to either.
    """

    hub_id: str
    revision: str | None
    subsets: Sequence[str] | None
    data_files: Any

    @property
    def name(self) -> str:
        return self.hub_id if self.data_files is None else "task.data_files"

    def split_name(self, split: str) -> str:
        """Where the rows of a split lie: everything is in one place if one file was given."""
        return split if self.data_files is None or isinstance(self.data_files, dict) else ONE_FILE

    def faults(self, needed: Iterable[str], known: Iterable[str]) -> list[str]:
        """What is wrong with `data_files`, given the splits that are needed or may be given."""
        given, needed, known = self.data_files, list(dict.fromkeys(needed)), list(known)
        if given is None or isinstance(given, (str, list)):
            return []
        like = f"task.data_files={{{','.join(f'{split}:FILE' for split in needed)}}}"
        if not isinstance(given, dict):
            return [f"task.data_files={given!r}: give a file, a list of files or {like}"]
        found = [
            f"task.data_files has {split!r}, which {self.hub_id} hasn't"
            f"{did_you_mean(split, known)}; give {like}"
            for split in given
            if split not in known
        ]
        return found + [
            f"task.data_files has no file for {split!r}; give {like}"
            for split in needed
            if split not in given
        ]

    def read(self, split: str, columns: Sequence[str], optional: Sequence[str]) -> list[Row]:
        """All rows of a split, with these columns; optional ones are `None` where they lack.

        Raises `UserError` where data or columns are missing.
        """
        if self.data_files is None:
            parts = [self._from_hub(subset, split) for subset in self.subsets or [None]]
        else:
            given = self.data_files
            chosen = given[split] if isinstance(given, dict) else given
            parts = [_from_file(path) for path in files_of(chosen)]
        rows: list[Row] = []
        for where, cells in parts:
            _check_columns(where, cells, columns)
            for number, row in enumerate(cells, start=1):
                kept = {name: row.get(name) for name in (*columns, *optional)}
                rows.append(Row(f"{where}, row {number}", kept))
        return rows

    def _from_hub(self, subset: str | None, split: str) -> tuple[str, list[dict[str, Any]]]:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        where = f"{self.hub_id} ({subset}, {split})" if subset else f"{self.hub_id} ({split})"
        try:
            data = load_dataset(self.hub_id, subset, split=split, revision=self.revision)
        except (DatasetsError, OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"task.hub_id={self.hub_id}: can't load the data set {where} ({_brief(error)}). "
                "If it is gated, ask for access on its page and run `hf auth login`; without a "
                "connection, give files with the same columns: task.data_files=FILE.parquet "
                f"(csv or jsonl), or task.data_files={{{split}:FILE.parquet}} by split"
            ) from error
        return where, list(data)  # type: ignore[arg-type]


def files_of(chosen: Any) -> list[Path]:
    """Files of a path, a pattern or a list of them."""
    found: list[Path] = []
    for pattern in [chosen] if isinstance(chosen, str) else chosen:
        full = str(home(pattern, "task.data_files"))
        # A file may have brackets in its name.
        here = [full] if Path(full).is_file() else sorted(glob.glob(full))
        if not here:
            raise UserError(f"task.data_files: there is no file {pattern}")
        if odd := [name for name in here if not Path(name).is_file()]:
            raise UserError(f"task.data_files: {odd[0]} is no file")
        found += map(Path, here)
    return found


def _from_file(path: Path) -> tuple[str, list[dict[str, Any]]]:
    from datasets import Features, Value, config, load_dataset
    from datasets.exceptions import DatasetsError

    # Else each reading is counted at Hugging Face, which takes seconds without a connection.
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"task.data_files: {path} must end in {', '.join(KINDS)}")
    text = "" if kind == "parquet" else users_text(path, "task.data_files")
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if HALF.search(line):
                json_line(line, f"{path}, line {number}")
    try:
        options: dict[str, Any] = {}
        if kind == "csv":
            # Cells stay as they are written: "None" is a text, and so is "007".
            header = next(csv.reader(io.StringIO(text, newline="")), [])
            texts = Features({name: Value("string") for name in header})
            options = {"features": texts, "keep_default_na": False}
        data = load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
        return str(path), list(data)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"task.data_files: can't read {path} ({_brief(error)})") from error


def _check_columns(where: str, cells: list[dict[str, Any]], columns: Sequence[str]) -> None:
    if not cells:
        raise UserError(f"{where} has no rows")
    if missing := [name for name in columns if name not in cells[0]]:
        raise UserError(
            f"{where} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}"
            f"{did_you_mean(missing[0], cells[0])}; it has {', '.join(cells[0])}"
        )


def _brief(error: BaseException) -> str:
    """The first line of an error, or of what it was raised from if it says more."""
    said = [str(one).strip() for one in (error.__cause__, error) if one is not None]
    return next((text.splitlines()[0][:300] for text in said if text), repr(error))
