"""A Hydra application of someone else's in the same environment: it finds our plugins, and pays
nothing for them, even where what they work with can't be imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

REFUSED = ("torch", "transformers", "sae_lens", "mlflow", "datasets", "sklearn", "numpy")
APPLICATION = """
import sys
from importlib.abc import MetaPathFinder

REFUSED = {refused}

class Refusing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ImportError(f"no {{name}} in this environment")
        return None

sys.meta_path.insert(0, Refusing())

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

ConfigStore.instance().store("config", {{"x": 1}})

@hydra.main(version_base=None, config_path=None, config_name="config")
def main(config):
    found = sorted(n for n in Plugins.instance().class_name_to_class if ".crl_exp_" in n)
    print("x is", config.x, len(found), sorted(set(REFUSED) & set(sys.modules)))

main()
"""


@pytest.mark.parametrize(
    ("words", "numbers"), [(["x=2"], [2]), (["-m", "x=1,2"], [1, 2])], ids=["alone", "sweep"]
)
def test_it_runs_without_our_libraries_and_without_a_warning(words, numbers, tmp_path):
    script = tmp_path / "app.py"
    script.write_text(APPLICATION.format(refused=REFUSED))
    done = subprocess.run(
        [sys.executable, "-W", "always", str(script), *words], cwd=tmp_path, text=True,
        capture_output=True, env=environment(), timeout=300,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith("x is")]
    # Classes of ours: two launchers, their base, and two sweepers.
    assert said == [f"x is {number} 5 []" for number in numbers], done.stdout + done.stderr
    assert (done.returncode, done.stderr) == (0, "")


def environment() -> dict[str, str]:
    """This one, without what coverage or a person set for Python itself."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_the_refusal_refuses():
    """Else the one above would show nothing."""
    program = APPLICATION.format(refused=REFUSED).partition("import hydra")[0]
    command = [sys.executable, "-c", program + "import torch"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert "no torch in this environment" in done.stderr
