"""Stage 1's statistics on disk: shared by runs, by layer and weights, and told when damaged."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crl_exp.config.errors import UserError
from crl_exp.steering.feature_statistics.store import LayerStatistics, shared_statistics
from tests.helpers import forking
from tests.helpers.tiny_steering import random_sae, statistics

REPO = Path(__file__).resolve().parents[2]

RACE = """
import sys, time
from pathlib import Path
sys.path.insert(0, ".")
from tests.helpers.tiny_steering import random_sae, statistics
from crl_exp.steering.feature_statistics.store import shared_statistics
home, me = Path(sys.argv[1]), sys.argv[2]
(home / f"ready_{me}").touch()
while len(list(home.glob("ready_*"))) < 2:
    time.sleep(0.01)
def compute(missing, partial):
    with open(home / "computed", "a") as log:
        log.write(" ".join(map(str, missing)) + "\\n")
    time.sleep(0.5)
    return {layer: statistics(layer, 8) for layer in missing}
found = shared_statistics(home, "key", {2: random_sae(2, 8), 3: random_sae(3, 8)}, compute)
assert set(found) == {2, 3} and found[3].layer == 3
"""


@pytest.mark.slow
def test_processes_started_together_compute_a_layer_once(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [forking.python(), "-c", RACE, str(tmp_path)]
    both = [subprocess.Popen([*command, name], cwd=REPO, env=environment) for name in "ab"]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    assert (tmp_path / "computed").read_text() == "2 3\n"


def test_stored_statistics_are_reused_by_layer_and_weights(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def compute(missing, partial) -> dict[int, LayerStatistics]:
        asked.append(sorted(missing))
        return {layer: statistics(layer, 8) for layer in missing}

    def get(key: str, **seeds: int) -> dict[int, LayerStatistics]:
        saes = {int(k[1:]): random_sae(int(k[1:]), 8, seed=v) for k, v in seeds.items()}
        return shared_statistics(tmp_path, key, saes, compute)

    first = get("a", l2=0)
    again = get("a", l2=0, l3=0)
    assert vars(first[2]).keys() == vars(again[2]).keys()
    for name, tensor in statistics(2, 8).by_feature.items():
        assert torch.equal(again[2].by_feature[name], tensor)
    assert torch.equal(again[2].std_D, statistics(2, 8).std_D)
    get("a", l2=1)
    get("b", l2=0)
    assert asked == [[2], [3], [2], [2]]


def test_the_same_weights_at_another_site_or_read_otherwise_have_statistics_of_their_own(
    tmp_path: Path,
) -> None:
    """What nearly all SAEs are is filed as it was before this was looked at."""
    usual = random_sae(2, 8)
    without_b_dec = random_sae(2, 8)
    without_b_dec.sae.cfg = {"apply_b_dec_to_input": False}  # type: ignore[assignment]
    said = random_sae(2, 8)
    said.sae.cfg = {"apply_b_dec_to_input": True, "normalize_activations": "none"}  # type: ignore[assignment]
    others = [random_sae(2, 8, kind="pre"), replace(usual, centered=True), without_b_dec]
    for made in (usual, said, *others):
        assert made.digest == usual.digest
        shared_statistics(tmp_path, "key", {2: made}, lambda *_: {2: statistics(2, 8)})
    names = {path.name for path in (tmp_path / "key").glob("*.safetensors")}
    assert len(names) == 1 + len(others) and f"layer_2_{usual.digest}.safetensors" in names


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other"])
def test_a_corrupt_file_is_told(tmp_path: Path, damage: str) -> None:
    saes = {2: random_sae(2, 8)}

    def get() -> dict[int, LayerStatistics]:
        return shared_statistics(tmp_path, "key", saes, lambda *_: {2: statistics(2, 8)})

    get()
    file = next((tmp_path / "key").glob("*.safetensors"))
    whole = file.read_bytes()
    if damage == "other":
        from safetensors.torch import save_file

        save_file({"mean_D": torch.zeros(3)}, file, metadata={"statistics": '{"layer": 2}'})
    else:
        file.write_bytes({"cut": whole[:-20], "empty": b"", "text": b"hello" * 40}[damage])
    with pytest.raises(UserError, match="delete the file") as caught:
        get()
    assert str(file) in str(caught.value)
    file.unlink()
    assert get()[2].n == 100
