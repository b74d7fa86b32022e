"""What a run draws once is another draw at each layer, also between runs at single layers."""

from __future__ import annotations

import itertools

import pytest
import torch

from crl_exp.analysis.row_random import own_seed
from crl_exp.experiments.workspace import RunWorkspace
from tests.helpers.tiny_run import LAYERS, lab_of


@pytest.fixture(scope="module")
def common(tiny_files, tmp_path_factory) -> list[str]:
    out = tmp_path_factory.mktemp("draws")
    return [*tiny_files.overrides(), f"output_dir={out}", "method.multipliers=[1]"]


def at(common: list[str], layer: int | None, *more: str) -> RunWorkspace:
    """The workspace of a run at one layer, or at all."""
    where = ["layers=all"] if layer is None else ["layers=single", f"layers.layer={layer}"]
    return lab_of([*common, *where, *more])


def directions(workspace: RunWorkspace) -> dict[int, torch.Tensor]:
    vector_D = workspace.exp.method.prepare(workspace).vector_D  # type: ignore[attr-defined]
    return {layer: vector / vector.norm() for layer, vector in vector_D.items()}


def test_seeds_of_uses_seeds_and_layers_are_all_different():
    places = [*itertools.product(("a", "b"), (0, 1, 12), (0, 1, 2)), ("a", 1, 20), ("a", 11, 0)]
    assert len({own_seed(*place) for place in places}) == len(places)
    assert own_seed("a", 2**62, 3) < 2**63, "as torch takes it"


def test_random_directions_of_runs_at_single_layers_differ(common):
    alone = {n: directions(at(common, n, "method=random_direction"))[n] for n in LAYERS}
    for a, b in itertools.combinations(LAYERS, 2):
        assert abs(float(alone[a] @ alone[b])) < 0.9
    together = directions(at(common, None, "method=random_direction"))
    for layer in LAYERS:
        torch.testing.assert_close(together[layer], alone[layer])


def test_random_features_of_runs_at_single_layers_are_drawn_apart(common):
    """With the same features to choose from at each layer the choices aren't the same."""
    chosen: dict[int, list[int]] = {layer: [] for layer in LAYERS}
    for seed in range(4):
        more = ["method=random", f"seed={seed}", "warmup.min_frequency=0"]
        together = at(common, None, *more)
        all_layers = {s.layer: s.feature_idx for s in together.exp.method.select(together)}  # type: ignore[attr-defined]
        for layer in LAYERS:
            workspace = at(common, layer, *more)
            n = len(workspace.statistics()[layer].allowed(0))
            assert n == workspace.saes[layer].d_sae
            (steer,) = workspace.exp.method.select(workspace)  # type: ignore[attr-defined]
            assert all_layers[layer] == steer.feature_idx
            chosen[layer].append(steer.feature_idx)
    # CorrSteer's feature is left out, which moves the others by one place at most.
    for a, b in itertools.combinations(LAYERS, 2):
        apart = [abs(x - y) for x, y in zip(chosen[a], chosen[b], strict=True)]
        assert max(apart) > 1, f"layers {a} and {b} share their draws: {chosen}"


def test_policies_of_runs_at_single_layers_start_with_other_weights(common):
    first = ["method=crl", "policy.policy_depth=1", "policy.critic_depth=1",
             "policy.first_weights=by_layer"]  # fmt: skip

    def weights(workspace: RunWorkspace) -> dict[int, list[torch.Tensor]]:
        agents = workspace.exp.method.free_agents(workspace)  # type: ignore[attr-defined]
        return {
            la: [agent.policy[0].weight, agent.critic[0].weight] for la, agent in agents.items()
        }

    together = weights(at(common, None, *first))
    alone = {n: weights(at(common, n, *first))[n] for n in LAYERS}
    for layer in LAYERS:
        assert all(map(torch.equal, together[layer], alone[layer]))
    for a, b in itertools.combinations(LAYERS, 2):
        assert not any(map(torch.allclose, alone[a], alone[b]))
    other = weights(at(common, 1, *first, "seed=1"))[1]
    assert not any(map(torch.allclose, alone[1], other))


def test_first_weights_by_seed_are_those_of_earlier_versions(common):
    """Drawn layer by layer after the seed; so those of single layers are the first layer's."""
    deep = ["method=crl", "policy.policy_depth=1", "policy.first_weights=by_seed", "seed=3"]
    torch.manual_seed(3)
    expected = torch.nn.Linear(32, 8).weight
    for layer in (None, *LAYERS):
        workspace = at(common, layer, *deep, "method.stage2=false")
        agents = workspace.exp.method.prepare(workspace).agents  # type: ignore[attr-defined]
        assert torch.equal(next(iter(agents.values())).policy[0].weight, expected)
