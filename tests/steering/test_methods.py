"""What CorrSteer-S, -A and -P, their candidates and the random control choose to add."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

from crl_exp.config import compatibility
from crl_exp.experiments.workspace import RunWorkspace
from crl_exp.generation.controller import Unsteered
from crl_exp.steering.controllers.fixed import Steer
from crl_exp.steering.methods.corrsteer import CorrSteerP
from tests.helpers.tiny_run import lab_of
from tests.steering.test_parity import TASK

SIZES = ["task.n_train=44", "task.n_validation=32", "task.n_test=4"]


@pytest.fixture(scope="module")
def common(tiny_files, tmp_path_factory) -> list[str]:
    out = tmp_path_factory.mktemp("methods")
    steering = ["layers=all", "coefficient=relative", "coefficient.ratio=0.5"]
    return [*tiny_files.overrides(), *SIZES, *steering, f"output_dir={out}"]


def most_correlated(workspace, layer: int, k: int = 1) -> list[int]:
    statistics = workspace.statistics()[layer]
    allowed = statistics.allowed(workspace.exp.warmup.min_frequency).tolist()
    return sorted(allowed, key=lambda f: float(statistics.correlation[f]), reverse=True)[:k]


def alone(workspace, layer: int, feature: int) -> float:
    """Validation reward of one feature, at the best of the multipliers."""
    coefficient = float(
        workspace.exp.coefficient.values(workspace.statistics()[layer], workspace.saes[layer])[
            feature
        ]
    )
    return max(
        workspace.validation_reward(workspace.fixed([Steer(layer, feature, coefficient * m)]))
        for m in workspace.exp.method.multipliers
    )


def test_s_takes_the_most_correlated_feature_of_all_layers(common):
    workspace = lab_of([*common, "method=corrsteer_s"])
    (steer,) = workspace.exp.method.select(workspace)
    best = {layer: most_correlated(workspace, layer)[0] for layer in workspace.saes}
    layer = max(best, key=lambda at: float(workspace.statistics()[at].correlation[best[at]]))
    assert (steer.layer, steer.feature_idx) == (layer, best[layer])


def test_a_takes_the_most_correlated_feature_of_each_layer(common):
    workspace = lab_of([*common, "method=corrsteer_a"])
    found = {steer.layer: steer.feature_idx for steer in workspace.exp.method.select(workspace)}
    assert found == {layer: most_correlated(workspace, layer)[0] for layer in workspace.saes}


def test_p_keeps_the_layers_that_help_alone(common):
    gentle = ["method.multipliers=[1]", "coefficient.ratio=0.2"]
    workspace = lab_of([*common, "method=corrsteer_p", *gentle])
    floor = float(workspace.baseline("validation").reward_B.mean())
    best = {layer: most_correlated(workspace, layer)[0] for layer in workspace.saes}
    helping = {layer: f for layer, f in best.items() if alone(workspace, layer, f) > floor}
    assert 0 < len(helping) < len(best), "this task can't tell -P from -A"
    assert {s.layer: s.feature_idx for s in workspace.exp.method.select(workspace)} == helping


def test_of_several_candidates_the_best_on_validation_is_taken(common):
    workspace = lab_of([*common, "method=corrsteer_a", "method.n_candidates=5"])
    found = {steer.layer: steer.feature_idx for steer in workspace.exp.method.select(workspace)}
    expected = {}
    for layer in workspace.saes:
        features = most_correlated(workspace, layer, 5)
        expected[layer] = max(features, key=lambda f, at=layer: alone(workspace, at, f))
    assert found == expected
    assert any(expected[layer] != most_correlated(workspace, layer)[0] for layer in workspace.saes)


def test_s_tries_candidates_of_all_layers_together(common):
    workspace = lab_of([*common, "method=corrsteer_s", "method.n_candidates=6"])
    pool = [(layer, f) for layer in workspace.saes for f in most_correlated(workspace, layer, 6)]
    pool.sort(key=lambda p: float(workspace.statistics()[p[0]].correlation[p[1]]), reverse=True)
    assert len({layer for layer, _ in pool[:6]}) > 1
    (steer,) = workspace.exp.method.select(workspace)
    assert (steer.layer, steer.feature_idx) == max(pool[:6], key=lambda p: alone(workspace, *p))


def test_random_features_are_others_of_the_same_length(common):
    workspace = lab_of([*common, "method=random"])
    fixed = lab_of([*common, "method=corrsteer_a"])
    ours, theirs = workspace.exp.method.select(workspace), fixed.exp.method.select(fixed)
    for random, steer in zip(ours, theirs, strict=True):
        norm_F = workspace.saes[steer.layer].dec_norm_F
        assert random.layer == steer.layer and random.feature_idx != steer.feature_idx
        assert random.coefficient * norm_F[random.feature_idx] == pytest.approx(
            float(steer.coefficient * norm_F[steer.feature_idx]), rel=1e-5
        )


def test_a_choice_that_a_run_of_this_process_tried_is_not_tried_again(common, monkeypatch):
    """CorrSteer-P tries at each layer what another run tried there; other strengths it must."""
    played: list[int] = []
    answer = RunWorkspace.answer

    def counted(self, controller, split, items=None, *more, **named):
        played.append(len(items))
        return answer(self, controller, split, items, *more, **named)

    def tries(seed: int, layer: int, *coefficients: float) -> list[float]:
        workspace = lab_of([*common, "method=corrsteer_s", f"seed={seed}"])  # a run of its own
        monkeypatch.setattr(RunWorkspace, "answer", counted)
        rewards = [
            workspace.validation_reward(workspace.fixed([Steer(layer, 3, c)])) for c in coefficients
        ]
        monkeypatch.undo()
        return rewards

    first = tries(7, 1, 2.5, 5.0)
    assert sum(played) == 2 * 32
    assert tries(8, 1, 2.5, 5.0) == first and sum(played) == 2 * 32
    tries(9, 2, 2.5)
    tries(10, 1, 2.25)
    assert sum(played) == 4 * 32


def test_of_equal_multipliers_the_smallest_is_taken(common):
    """None of these moves an answer."""
    tiny = ["method=corrsteer_a", "method.multipliers=[3e-6,1e-6,2e-6]"]
    workspace = lab_of([*common, *tiny])
    for steer in workspace.exp.method.select(workspace):
        coefficient = float(workspace.coefficients(steer.layer)[steer.feature_idx])
        assert steer.coefficient == pytest.approx(1e-6 * coefficient)


def test_p_keeps_no_layer_that_only_equals_the_unsteered_model(common):
    workspace = lab_of([*common, "method=corrsteer_p", "method.multipliers=[1e-6]"])
    assert workspace.exp.method.select(workspace) == []
    assert any("kept no layer" in warning for warning in workspace.warnings)


def test_random_features_follow_the_seed_and_are_allowed(common):
    drawn: dict[int, list[int]] = {}
    for seed in (*range(8), 0):
        more = ["method=random", f"seed={seed}", "method.multipliers=[1]"]
        workspace = lab_of([*common, *more, "warmup.min_frequency=0.5"])
        for steer in workspace.exp.method.select(workspace):
            allowed = workspace.statistics()[steer.layer].allowed(0.5).tolist()
            assert steer.feature_idx in allowed and len(allowed) < 50
            drawn.setdefault(steer.layer, []).append(steer.feature_idx)
    for features in drawn.values():
        assert len(set(features)) > 3 and features[0] == features[-1]


def test_a_rollout_is_of_training_items(common):
    workspace = lab_of([*common, "method=none"])
    items = [5, 0, 5, *range(10, 30)]
    reward_B = workspace.answer(Unsteered(), "train").reward_B[items]
    assert 0 < float(reward_B.mean()) < 1
    assert workspace.play(Unsteered(), items)[1].tolist() == reward_B.tolist()


@pytest.mark.parametrize(("task", "n_tokens"), [(None, 1), (TASK, 5)])
def test_a_line_over_the_answer_ends_at_its_last_token(task, n_tokens, common):
    """`position_linear` is made for as many tokens as an answer has at most."""
    workspace = lab_of([*common, "method=crl", "fusion=position_linear"], task)
    for made in workspace.exp.method.free_agents(workspace).values():
        assert made.pipeline.stages["fusion"].n_tokens == n_tokens


class NullLab:
    """A workspace where steering changes nothing but by chance: every try has its own rewards."""

    def __init__(self, draw: np.random.Generator, n: int, layers: int):
        self.draw, self.n, self.layers = draw, n, layers
        self.floor = draw.random(n) < 0.5
        self.tried: list[list[Steer]] = []

    def validation_reward(self, controller) -> float:
        if isinstance(controller, Unsteered):
            return float(self.floor.mean())
        self.tried.append(controller)
        flip = self.draw.random(self.n) < 0.2
        return float(np.where(flip, self.draw.random(self.n) < 0.5, self.floor).mean())

    def fixed(self, steers):
        return steers

    def note(self, *_) -> None: ...

    warn = note

    @contextmanager
    def bar(self, *_):
        yield lambda n: None


@pytest.mark.parametrize("n", [12, 500])
@pytest.mark.parametrize("n_candidates", [1, 4])
def test_p_keeps_a_null_layer_as_often_as_one_comparison_does(n, n_candidates, monkeypatch):
    """With the best of three multipliers it was .47 instead of .18, and .66 instead of .46."""
    method = CorrSteerP("corrsteer_p", [1.0, 2.0, 4.0], n_candidates)
    candidates = [[Steer(la, f, 3.0) for f in range(n_candidates)] for la in range(25)]
    monkeypatch.setattr(CorrSteerP, "candidates", lambda *_: candidates)
    draw, kept, one = np.random.default_rng(8), 0, 0
    for _ in range(80):
        workspace = NullLab(draw, n, 25)
        kept += len(method.select(workspace))  # type: ignore[arg-type]
        floor = workspace.floor.mean()
        one += sum(workspace.validation_reward([]) > floor for _ in range(25))
    # 2,000 of each, five in a hundred apart at most by chance
    assert kept / 2000 == pytest.approx(one / 2000, abs=0.05)


def test_p_tests_with_the_multiplier_nearest_to_one_and_scales_what_it_kept(monkeypatch):
    for multipliers, tested in (([1.0, 2.0, 4.0], 1.0), ([4.0, 2.0], 2.0), ([0.25, 8.0], 0.25)):
        method = CorrSteerP("corrsteer_p", multipliers, 1)
        monkeypatch.setattr(CorrSteerP, "candidates", lambda *_: [[Steer(0, 0, 3.0)]])
        workspace = NullLab(np.random.default_rng(0), 50, 1)
        workspace.floor = np.zeros(50, bool)  # so that a try is better
        method.select(workspace)  # type: ignore[arg-type]
        strengths = [steers[0].coefficient / 3 for steers in workspace.tried]
        assert strengths == [tested, *sorted(multipliers)]


def test_only_results_of_p_that_were_chosen_so_have_another_key():
    def mended(target: str, multipliers, n_candidates=1) -> bool:
        method = {"_target_": f"crl_exp.steering.methods.crl.{target}", "multipliers": multipliers,
                  "n_candidates": n_candidates}  # fmt: skip
        return "mended" in compatibility.hashed({"method": method})

    assert mended("CorrSteerP", [1.0, 2.0]) and mended("CorrSteerP", [1.0], 2)
    assert not mended("CorrSteerP", [2.0]) and not mended("CorrSteerA", [1.0, 2.0])
