"""docs/tutorial.ipynb, run in a kernel of its own. `python -m tests.helpers.tutorial` runs it and
keeps what it printed and drew, for those who only read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from crl_exp.config.paths import REPO

NOTEBOOK = REPO / "docs" / "tutorial.ipynb"
SECONDS = 600  # for one cell, on a busy machine


def executed(folder: Path) -> nbformat.NotebookNode:
    """The notebook as it is after every cell was run in `folder`. Raises `CellExecutionError`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    return client.execute()


def environment(folder: Path) -> dict[str, str]:
    """What the kernel needs to find this checkout, and to leave the home directory alone."""
    return {
        "PYTHONPATH": str(REPO),
        "CRL_EXP_CACHE": str(folder / "cache"),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "jupyter"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
    }


def for_readers(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without progress bars and warnings, counts and times; a figure in place of its text."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
        for output in cell.outputs:
            output.pop("execution_count", None)
            if output.output_type == "execute_result":
                output.execution_count = None
            data, output.metadata = output.get("data", {}), {}
            if output.output_type == "stream":
                output.pop("metadata")
            for kind in [*data]:
                if kind not in ("text/plain", "image/png"):
                    del data[kind]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        os.environ |= environment(Path(made))
        work = Path(made, "work")
        work.mkdir()
        nbformat.write(for_readers(executed(work)), NOTEBOOK)


if __name__ == "__main__":
    main()
