"""CRL without its second stage, features fixed, gives what CorrSteer-A gives, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq
import pytest
import torch

from crl_exp.experiments.workspace import Answers
from crl_exp.tasks.base import Item, Score, Splits, Task, content_id, split_items
from tests.helpers.tiny import D_MODEL
from tests.helpers.tiny_run import lab_of, run_small

CRL = ["method=crl", "method.stage2=false", "method.features=fixed"]
# In these columns the two must agree; log_prob and value are the policy's own.
COLUMNS = ["split", "item", "token_index", "layer", "token", "features", "coefficients", "changed"]
FIGURES = ("n", "accuracy_baseline", "accuracy_steered", "fixed", "broken", "ser_all_changed")


@dataclass
class FreeText(Task):
    """Several tokens of free text, rewarded where the last word's number is even."""

    @property
    def scorer_name(self) -> str:
        return "even"

    def draw(self) -> Splits:
        users = [f"w{i} w{(7 * i + j) % 58} w{j}" for i in range(20) for j in range(4)]
        items = [Item(content_id(user), user) for user in users]
        sizes = {"train": self.n_train, "validation": self.n_validation, "test": self.n_test}
        return Splits(*split_items(items, sizes, self.split_seed, "test"))

    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        last = [output.split()[-1] if output.split() else "w1" for output in outputs]
        return [Score(float(word[-1] in "02468")) for word in last]


TASK = FreeText(
    name="free_text", n_train=40, n_validation=10, n_test=24, split_seed=0, train_seed=None,
    groups=None, max_new_tokens=5, choices=None, chat_template=True, shuffle_labels=False,
)  # fmt: skip


def answers(overrides: list[str]) -> Answers:
    """The steered answers to the test items, actions recorded."""
    workspace = lab_of(overrides, TASK)
    return workspace.answer(workspace.exp.method.prepare(workspace), "test", record=True)


def actions(answered: Answers) -> dict[tuple[int, int], torch.Tensor]:
    """Features, coefficients and what was added, by layer and token, rows in order."""
    found: dict[tuple[int, int], list] = {}
    for step in answered.generation.steps:
        action = step.action
        assert step.token_B is not None
        parts = (
            action.feature_idx_BK,
            action.coefficient_BK,
            action.delta_BD,
            step.token_B[:, None],
        )
        rows = torch.cat([part.double() for part in parts], dim=1)
        found.setdefault((step.layer, step.token_index), []).append(rows[step.alive_B])
    return {place: torch.cat(rows) for place, rows in found.items()}


@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.slow), "gemma2"])
@pytest.mark.parametrize(
    "more",
    [
        ["coefficient=mean_positive"],
        ["coefficient=mean_positive", "decay=exponential", "decay.gamma=0.8"],
        ["coefficient=relative", "fusion=multiply"],
        ["coefficient=contrastive", "policy.policy_depth=2", "noise=gaussian"],
    ],
    ids=lambda more: ",".join(more),
)
def test_free_text_of_several_tokens_at_several_layers(kind, more, tiny_files, tmp_path):
    common = [*tiny_files.overrides(kind), "layers=all", f"output_dir={tmp_path}", *more]
    corrsteer = answers([*common, "method=corrsteer_a"])
    crl = answers([*common, *CRL])
    assert crl.generation.tokens == corrsteer.generation.tokens
    assert crl.generation.texts == corrsteer.generation.texts
    assert crl.scores == corrsteer.scores
    steered, by_policy = actions(corrsteer), actions(crl)
    assert steered.keys() == by_policy.keys()
    assert all(torch.equal(steered[place], by_policy[place]) for place in steered)
    assert {layer for layer, _ in steered} == {0, 1, 2} and {t for _, t in steered} == set(range(5))
    assert steered[0, 0].shape == (TASK.n_test, 2 + D_MODEL + 1)
    unsteered = lab_of([*common, "method=none"], TASK).baseline("test")
    assert corrsteer.generation.tokens != unsteered.generation.tokens, "nothing was steered"


def same_run(common: list[str]) -> None:
    """Both methods through the whole experiment: the same interventions and figures."""
    tables, results = [], []
    for method in (["method=corrsteer_a"], CRL):
        result, folder = run_small([*common, *method])
        tables.append(pq.read_table(folder / "interventions.parquet").select(COLUMNS))
        results.append({key: result[key] for key in FIGURES})
        results[-1]["validation"] = {key: result["validation"][key] for key in FIGURES}
    assert tables[0].num_rows > 0
    assert tables[0].equals(tables[1])
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_whole_runs_of_a_choice_task(kind, tiny_files, tmp_path):
    same_run(
        [*tiny_files.overrides(kind), "layers=all", "coefficient=mean_positive",
         f"output_dir={tmp_path}"]
    )  # fmt: skip


@pytest.mark.assets
@pytest.mark.slow
def test_whole_runs_on_smollm2(tmp_path):
    same_run(
        ["layers=all", "coefficient=mean_positive", "tracking=none", f"output_dir={tmp_path}",
         "task.n_train=60", "task.n_validation=20", "task.n_test=40"]
    )  # fmt: skip
