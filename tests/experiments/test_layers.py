"""Layer sets against the layers that have an SAE."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from crl_exp.config.errors import UserError
from crl_exp.experiments.layers import All, BestOnValidation, LayerSet, Listed, Range, Single
from tests.helpers.tiny_run import LAYERS, run_small

AVAILABLE = [8, 12, 22]


@pytest.mark.parametrize(
    ("chosen", "layers"),
    [
        (Single(12), [12]),
        (Listed([22, 8, 22]), [8, 22]),
        (All(), AVAILABLE),
        (Range(8, 12, 1), [8, 12]),
        (Range(0, 29, 11), [22]),
        (Range(8, 29, 4), [8, 12]),
        (BestOnValidation(None), AVAILABLE),
        (BestOnValidation([12, 8]), [8, 12]),
    ],
)
def test_sets_resolve_to_sorted_layers(chosen: LayerSet, layers: list[int]) -> None:
    assert chosen.resolve(AVAILABLE, 30) == layers


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (Single(30), "layer 30 is out of range: the model has layers 0 to 29"),
        (Single(-1), "layer -1 is out of range"),
        (Listed([8, 9]), "layer 9 has no SAE; those that have one: [8, 12, 22]"),
        (Listed([]), "layers: the set is empty (layers with an SAE: [8, 12, 22]); try layers=all"),
        (Range(9, 11, 1), "layers: the set is empty"),
        (Range(8, 30, 1), "layers.last=30 is out of range"),
        (BestOnValidation([8, 9]), "layer 9 has no SAE"),
    ],
)
def test_impossible_sets_are_told(chosen: LayerSet, said: str) -> None:
    with pytest.raises(UserError) as caught:
        chosen.resolve(AVAILABLE, 30)
    assert said in str(caught.value)
    assert "layers=" in str(caught.value) or "layers.last=" in str(caught.value)


@pytest.mark.parametrize("bad", [Range(12, 8, 1), Range(-1, 8, 1), Range(8, 12, 0)])
def test_a_range_that_is_none(bad: Range) -> None:
    assert "layers.first ≤ layers.last" in bad.faults()[0]
    assert Range(8, 8, 1).faults() == []


def test_a_model_with_fewer_layers_than_saes() -> None:
    with pytest.raises(UserError, match="layer 22 is out of range"):
        All().resolve(AVAILABLE, 20)


# --- the best layer on validation ---


def test_the_layer_is_the_one_that_does_best_on_validation(tiny_files, tmp_path) -> None:
    """Each layer run by itself gives the same rewards on validation as the choice recorded."""
    common = [*tiny_files.overrides(), "method=corrsteer_s", "coefficient=relative",
              f"output_dir={tmp_path}", "task.n_validation=24"]  # fmt: skip
    chosen, folder = run_small([*common, "layers=best_on_validation"])
    alone = {n: run_small([*common, f"layers.layer={n}"])[0] for n in LAYERS}
    on_validation = {n: result["validation"]["accuracy_steered"] for n, result in alone.items()}
    assert len(set(on_validation.values())) > 1, "the layers can't be told apart"
    assert chosen["notes"]["validation_reward_by_layer"] == pytest.approx(
        {str(n): reward for n, reward in on_validation.items()}
    )
    best = max(sorted(on_validation), key=lambda n: on_validation[n])
    assert chosen["notes"]["layer_chosen_on_validation"] == best
    assert chosen["layers"] == [best]
    for figure in ("accuracy_steered", "fixed", "broken", "validation"):
        assert chosen[figure] == alone[best][figure]
    assert set(pq.read_table(folder / "interventions.parquet")["layer"].to_pylist()) == {best}


def test_of_equal_layers_the_lowest_is_taken(tiny_files, tmp_path) -> None:
    """Steering too weak to move an answer."""
    weak = ["method=corrsteer_s", "coefficient=relative", "coefficient.ratio=1e-6"]
    common = [*tiny_files.overrides(), *weak, f"output_dir={tmp_path}"]
    result, _ = run_small([*common, "layers=best_on_validation"])
    assert len(set(result["notes"]["validation_reward_by_layer"].values())) == 1
    assert result["layers"] == [0]


def test_each_candidate_has_checkpoints_of_its_own(tiny_files, tmp_path) -> None:
    """A learned method too; a run that is cut off after the choice trains no layer again."""
    overrides = [*tiny_files.overrides(), "method=crl", "layers=best_on_validation",
                 "layers.among=[0,2]", f"output_dir={tmp_path}"]  # fmt: skip
    result, folder = run_small(overrides)
    assert sorted(p.name for p in folder.glob("layer_*")) == ["layer_0", "layer_2"]
    assert result["layers"][0] in (0, 2) and "best_update" in result["notes"]
    journals = [p.read_bytes() for p in sorted(folder.glob("layer_*/journal.jsonl"))]
    assert all(journals)
    chosen = (0, 2).index(result["layers"][0])
    assert (folder / "journal.jsonl").read_bytes() == journals[chosen]
    (folder / "result.json").unlink()
    again, _ = run_small(overrides)
    assert [p.read_bytes() for p in sorted(folder.glob("layer_*/journal.jsonl"))] == journals
    for figure in ("layers", "accuracy_steered", "notes"):
        assert again[figure] == result[figure]
