"""Whether an SAE fits a task's tokens: the figures, the tokens they are of, what is said of it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crl_exp.analysis import sae_fit
from crl_exp.analysis.sae_fit import SAEFit, TokenFit
from crl_exp.config.errors import UserError
from crl_exp.generation.controller import StepContext
from crl_exp.models.prompt_text import common_prefix
from crl_exp.report.comparison.rows import compare_runs
from crl_exp.report.console import terminal as tables
from crl_exp.report.tables import latex as table_latex
from crl_exp.report.tables.further import further_tables
from crl_exp.runs.directory import write_json
from crl_exp.runs.records import find_records
from crl_exp.saes import layer_sae
from crl_exp.saes.fit import fit_on
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.feature_statistics import fit as fit_measuring
from crl_exp.steering.feature_statistics.fit import Collector, fits_of
from crl_exp.tracking.sending.content import final_points
from tests.helpers.synthetic import config, finished_run
from tests.helpers.tiny_run import TinyFiles, lab_of, run_small, save_sae
from tests.helpers.tiny_steering import PlainSAE, explained_variance, fitted_sae
from tests.steering.test_only_needed import D_IN, lens_sae
from tests.steering.test_parity import TASK

LAYER = 1


def along(directions: list[list[float]]) -> LayerSAE:
    """Reconstructs what lies along these orthogonal unit directions, and nothing else."""
    rows = torch.tensor(directions)
    sae = PlainSAE(torch.cat([rows, -rows]), torch.zeros(rows.shape[1]))
    return LayerSAE(LAYER, f"blocks.{LAYER}.hook_resid_post", sae)


def test_figures_by_hand() -> None:
    """Own site: (±1, 0), (0, ±2), of which the second part is lost: 1 − 8/10; a feature is active
    at every second token. Before: nothing is lost. After: mean (0, 1), 1 − 5/1 for (0, 0), (0, 2)
    twice each would be 1 − 8/4 = −1. A token of 50 medians is left out everywhere."""
    own = torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2], [100, 0]])
    before = torch.tensor([[1.0, 0], [-1, 0], [2, 0], [-2, 0], [1, 0]])
    after = torch.tensor([[0.0, 0], [0, 0], [0, 2], [0, 2], [0, 2]])
    sae = along([[1.0, 0]])
    found = fit_on(sae, {1: own, 0: before, 2: after, 7: own})
    assert found is not None and (found.n, found.left_out, found.l0) == (4, 1, 0.5)
    assert found.explained_variance == pytest.approx(0.2, abs=1e-12)
    assert (found.one_before, found.one_after) == (1.0, -1.0)
    assert found.better_off() == ("one site before", 1.0)
    exact = fit_on(along([[1.0, 0], [0, 1]]), {1: own})
    assert exact is not None and (exact.explained_variance, exact.l0) == (1.0, 1.0)
    alone = fit_on(sae, {1: own})
    assert alone is not None and alone.one_before is alone.one_after is alone.better_off() is None
    assert fit_on(sae, {1: own[:1]}) is None and fit_on(sae, {1: torch.empty(0, 2)}) is None
    alike = fit_on(sae, {1: own[:1].expand(5, 2)})
    assert alike is not None and math.isnan(alike.explained_variance)


def test_tokens_are_spread_evenly_and_in_parts_the_same(monkeypatch) -> None:
    """Two kinds of tokens one after the other are both among those taken; means are over all."""
    draw = torch.Generator().manual_seed(0)
    x_ND = torch.cat([torch.randn(900, 4, generator=draw) + step for step in (3, -3)])
    x_ND = x_ND / x_ND.norm(dim=1, keepdim=True)  # no outliers
    sae = along([[0.5, 0.5, 0.5, 0.5]])
    whole = fit_on(sae, {1: x_ND})
    assert whole is not None and whole.n == sae_fit.TOKENS
    assert whole.explained_variance > 0.5, "what sets the two kinds apart counts"
    monkeypatch.setattr(layer_sae, "ENCODED_TOGETHER", 7)
    parts = fit_on(sae, {1: x_ND})
    assert parts is not None
    same = parts.explained_variance == pytest.approx(whole.explained_variance, abs=1e-12)
    assert same and replace(parts, explained_variance=whole.explained_variance) == whole


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_centred_and_normalised_inputs_as_saelens_has_them(kind: str, normalize: str) -> None:
    sae = lens_sae(kind, normalize)  # centered
    x_ND = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(0)) + 2
    read_ND = x_ND - x_ND.mean(dim=1, keepdim=True)
    for expected, got in zip((read_ND, sae.sae(read_ND)), sae.reconstruct(x_ND), strict=False):
        torch.testing.assert_close(got, expected)
    found = fit_on(sae, {2: x_ND})
    by_hand = 1 - (read_ND - sae.sae(read_ND)).square().sum() / (
        (read_ND - read_ND.mean(0)).square().sum()
    )
    assert found is not None and found.explained_variance == pytest.approx(float(by_hand), rel=1e-5)


def token_fit(own: float, before: float | None = None, after: float | None = None) -> TokenFit:
    return TokenFit(256, 0, own, 30.0, before, after)


@pytest.mark.parametrize(
    ("steered", "prompt", "verdict", "told"),
    [
        (token_fit(0.8, 0.7, 0.6), token_fit(0.9, 0.8, 0.7), None, ""),
        (token_fit(0.31), None, None, ""),
        (token_fit(-9.0, -8.0, -7.0), token_fit(0.8, 0.7), "poor_where_steered", "layers.layer="),
        (token_fit(0.29), token_fit(0.2), "poor", "sae.release="),
        (token_fit(0.29, 0.1), None, "poor", "train-sae 'layers=[8]'"),
        (token_fit(-9.0, -8.0, -7.0), token_fit(-1.0), "poor", "instruction-tuned"),
        (token_fit(0.7, 0.71), token_fit(0.9, 0.8), "off", "0.70 at the steered tokens but 0.71"),
        (token_fit(-9.0), token_fit(0.6, 0.5, 0.7), "off", "hook_name"),
        (token_fit(math.nan), None, None, ""),
        (token_fit(math.nan), token_fit(0.2), "poor", "0.20 at the prompts' others"),
        (None, token_fit(0.29), "poor", "0.29 at the prompts' others"),
        (None, token_fit(0.3), None, ""),
    ],
)  # fmt: skip
def test_what_is_said(
    steered: TokenFit | None, prompt: TokenFit | None, verdict, told: str
) -> None:
    fit = SAEFit(8, steered, prompt)
    assert fit.verdict == verdict
    said = sae_fit.warnings([fit, SAEFit(9, token_fit(0.9, 0.1), None)])
    assert len(said) == (verdict is not None)
    assert all(told in line and "layer 8" in line and "layer 9" not in line for line in said)


def test_the_first_token_of_a_prompt_is_left_out() -> None:
    collector = Collector([3], every=1)
    context = StepContext(0, [0, 1], torch.ones(2, dtype=torch.bool))
    for token in range(2):
        collector.act(3, torch.tensor([[0.0, token], [1.0, token]]), context)
    collector.end(context)
    assert collector.residuals({0})[3].tolist() == [[0, 1], [1, 0], [1, 1]]


# --- on a tiny model ---


def hidden_states(lm: Any, prompts: list[list[int]]) -> list[Tensor]:
    """Of each prompt, as transformers gives them [L + 1, T, D]."""
    with torch.no_grad():
        return [
            torch.cat(lm.model(torch.tensor([p]), output_hidden_states=True).hidden_states)
            for p in prompts
        ]


@pytest.fixture(scope="module")
def folders(tiny_files: TinyFiles, tmp_path_factory) -> dict[str, Path]:
    """SAEs of layer 1: the best linear one of that layer; that of the layer after, under its name;
    a random one."""
    root = tmp_path_factory.mktemp("saes")
    workspace = lab_of([*tiny_files.overrides(), f"output_dir={root}"])
    states = hidden_states(
        workspace.lm, workspace.prompt_ids("validation") + workspace.prompt_ids("train")
    )
    for name, of in (("own", LAYER), ("wrong", LAYER + 1)):
        x_ND = torch.cat([hidden[of + 1, 1:] for hidden in states])
        sae = fitted_sae(LAYER, x_ND, n_directions=24).sae
        n = len(sae.W_dec)  # type: ignore[arg-type]
        weights = {
            "W_dec": sae.W_dec, "W_enc": sae.W_dec.T.contiguous(),  # type: ignore[union-attr]
            "b_enc": torch.zeros(n), "b_dec": sae.b_dec, "threshold": torch.zeros(n),
        }  # fmt: skip
        save_sae(root / name, LAYER, weights)
    return {"own": root / "own", "wrong": root / "wrong", "random": tiny_files.root / "saes"}


def overrides(tiny_files: TinyFiles, folder: Path, out: Path, *more: str) -> list[str]:
    kept = [one for one in tiny_files.overrides() if not one.startswith("sae.folder=")]
    return [*kept, f"sae.folder={folder}", f"output_dir={out}", "layers.layer=1",
            "method=corrsteer_s", *more]  # fmt: skip


def told(result: dict[str, Any]) -> list[str]:
    return [line for line in result["warnings"] if "the SAE" in line]


@pytest.fixture(scope="module")
def runs(tiny_files, folders, tmp_path_factory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    return {
        name: run_small(overrides(tiny_files, folder, out, f"sweep_name={name}"))[0]
        for name, folder in folders.items()
    }


def test_an_sae_of_this_site_fits_and_is_worse_one_off(runs) -> None:
    fit = sae_fit.from_result(runs["own"])[LAYER]
    assert list(fit.token_fits) == ["steered", "prompt"] and told(runs["own"]) == []
    for one in fit.token_fits.values():
        assert one.explained_variance > 0.9
        assert one.one_before is not None and one.one_after is not None
        assert max(one.one_before, one.one_after) < one.explained_variance - 0.05


def test_one_of_another_site_and_a_random_one_are_warned_of(runs) -> None:
    (off,) = told(runs["wrong"])
    assert "one site off" in off and "one site after" in off and "sae.id_template" in off
    (poor,) = told(runs["random"])
    assert "less than 0.3" in poor and "layer 1: " in poor and "sae.folder=saes/mine" in poor


def test_figures_are_of_the_tokens_that_are_named(runs, tiny_files, folders, tmp_path) -> None:
    """One-token answers: every item's last prompt token, and of 16 prompts spread over the split
    what lies between their common beginning and it; against transformers' hidden states."""
    workspace = lab_of(overrides(tiny_files, folders["own"], tmp_path))
    ids, sae = workspace.prompt_ids("train"), workspace.saes[LAYER]
    states, start = hidden_states(workspace.lm, ids), max(1, common_prefix(ids))
    spread = [states[i * len(ids) // 16] for i in range(16)]
    tokens = {
        "steered": [hidden[:, -1:] for hidden in states],
        "prompt": [hidden[:, start:-1] for hidden in spread],
    }
    fit = sae_fit.from_result(runs["own"])[LAYER]
    for name, parts in tokens.items():
        x_SND, one = torch.cat(parts, dim=1), fit.token_fits[name]
        assert (one.n, one.left_out) == (x_SND.shape[1], 0)
        by_hand = [explained_variance(sae, x_SND[LAYER + 1 + step]) for step in (0, -1, 1)]
        got = [one.explained_variance, one.one_before, one.one_after]
        assert got == pytest.approx(by_hand, abs=1e-4), name
        active = (sae.encode(x_SND[LAYER + 1]) > 0).sum() / one.n
        assert one.l0 == pytest.approx(float(active), abs=0.1)


def test_tokens_of_longer_answers_are_those_of_stage_1(tiny_files, tmp_path, monkeypatch) -> None:
    """However they are cut into batches, also where a part of them is taken."""
    found = []
    monkeypatch.setattr("crl_exp.saes.fit.TOKENS", 50)
    for size in (3, 16):
        more = (f"engine.batch_size={size}", f"sweep_name=s{size}")
        workspace = lab_of(overrides(tiny_files, tiny_files.root / "saes", tmp_path, *more), TASK)
        statistics = workspace.statistics()[LAYER]
        (fit,) = fits_of(workspace).values()
        assert fit.steered is not None and fit.steered.n == 50
        engine = fit_measuring.Engine(workspace.lm, workspace.exp.engine)
        x_ND = fit_measuring.steered_tokens(workspace, engine, [LAYER])[LAYER]
        assert len(x_ND) > 100
        assert float(x_ND.norm(dim=1).mean()) == pytest.approx(statistics.norm_mean, rel=1e-5)
        found.append([fit.steered.explained_variance, fit.steered.one_after, fit.steered.l0])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_it_is_stored_beside_statistics_that_it_leaves_alone(
    tiny_files, folders, tmp_path, monkeypatch
) -> None:
    """Bit for bit; another run takes it from there; a store of before there was one is completed;
    a damaged file is named."""

    def run(out: str, seed: int) -> dict[str, Any]:
        more = overrides(tiny_files, folders["own"], tmp_path / out, f"seed={seed}")
        return run_small(more)[0]

    first = run("out", 0)
    (fit,) = (tmp_path / "out").glob("shared/warmup/*/fit_1_*.json")
    (statistics,) = fit.parent.glob("layer_1_*.safetensors")
    written = statistics.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(fit_measuring, "measured", lambda *_: pytest.fail("it is stored"))
        assert run("out", 1)["by_layer"] == first["by_layer"]
    fit.unlink()
    again = run("out", 2)
    assert statistics.read_bytes() == written and fit.exists()
    assert sae_fit.from_result(again)[LAYER].steered == sae_fit.from_result(first)[LAYER].steered
    fit.write_text('{"layer": 1}')
    with pytest.raises(UserError, match="delete the file; it is measured anew"):
        run("out", 3)
    with monkeypatch.context() as patch:
        patch.setattr("crl_exp.experiments.kinds.steering.fits_of", lambda workspace: {})
        assert "by_layer" not in run("without", 0)
    (plain,) = (tmp_path / "without").glob("shared/warmup/*/layer_1_*.safetensors")
    assert plain.read_bytes() == written and plain.parent.name == statistics.parent.name


def test_another_hook_in_the_same_weights_is_measured_anew(tiny_files, folders, tmp_path) -> None:
    folder = tmp_path / "saes"
    shutil.copytree(folders["own"], folder)
    workspace = lab_of(overrides(tiny_files, folder, tmp_path))
    workspace.statistics()
    before = fits_of(workspace)[LAYER]
    path = next(folder.glob("*/cfg.json"))
    written = path.read_text()
    assert "hook_resid_post" in written
    path.write_text(written.replace("hook_resid_post", "hook_resid_pre"))
    now = fits_of(lab_of(overrides(tiny_files, folder, tmp_path)))[LAYER]
    assert before.steered and now.steered
    assert now.steered.explained_variance == pytest.approx(before.steered.one_before, abs=1e-4)


def test_an_edited_hook_has_statistics_of_its_own_too(tiny_files, folders, tmp_path) -> None:
    """Those that a fresh folder has, though the weights, and so the SAE's digest, are the same."""
    folder = tmp_path / "saes"
    shutil.copytree(folders["own"], folder)

    def found(out: str, sweep: str) -> Any:
        made = lab_of(overrides(tiny_files, folder, tmp_path / out, f"sweep_name={sweep}"))
        return made.statistics()[LAYER]

    before = found("out", "before")
    path = next(folder.glob("*/cfg.json"))
    path.write_text(path.read_text().replace("hook_resid_post", "hook_resid_pre"))
    now, fresh = found("out", "after"), found("fresh", "after")
    for name, values_F in fresh.by_feature.items():
        assert torch.equal(now.by_feature[name], values_F), name
    assert now.norm_mean == fresh.norm_mean != before.norm_mean


# --- in MLflow and the report ---


def with_fit(run: Any, *fits: SAEFit) -> None:
    written = json.loads(run.result_path.read_text())
    series = sae_fit.by_layer({fit.layer: fit for fit in fits})
    write_json(run.result_path, {**written, "by_layer": series})


def test_it_is_in_mlflow_by_layer(tmp_path) -> None:
    run = finished_run(config(tmp_path), 0.1)
    with_fit(run, SAEFit(18, token_fit(0.7, None, 0.4), None),
             SAEFit(19, token_fit(math.nan), token_fit(0.6)))  # fmt: skip
    sent = {(p.name, p.step): p.value for p in final_points(run.result() or {}, 0)}
    assert sent["by_layer/sae_fit/steered/explained_variance", 18] == 0.7
    assert sent["by_layer/sae_fit/prompt/explained_variance", 19] == 0.6
    ours = {at for at in sent if "sae_fit" in at[0]}
    assert ("by_layer/sae_fit/steered/one_after", 18) in ours and len(ours) == 6
    back = sae_fit.from_result(run.result() or {})
    assert back[18] == SAEFit(18, token_fit(0.7, None, 0.4), None)
    assert back[19].steered and math.isnan(back[19].steered.explained_variance)


def test_the_report_has_a_line_a_layer_and_what_it_means(tmp_path) -> None:
    """Two draws of training items: .6 and .8, so .7; runs of before have none."""
    assert further_tables(compare_runs([finished_record(tmp_path / "old", 0)])) == []
    for seed, own in ((0, 0.6), (1, 0.8)):
        run = finished_run(config(tmp_path, seed=seed), 0.1)
        with_fit(run, SAEFit(18, token_fit(own, 0.1, -3.0), token_fit(0.9, 0.95)))
    finished_run(config(tmp_path, seed=2), 0.1)
    sweep = compare_runs(find_records(tmp_path / "demo"))
    (more,) = further_tables(sweep)
    assert more.lines == [
        ["18", "steered", "256", "0.70", "0.10", "-3.00", "30.0"],
        ["18", "prompts' others", "256", "0.90", "0.95", "–", "30.0"],
    ]
    assert any("one site off" in note and "but 0.95 one site before" in note for note in more.notes)
    for text in (tables.markdown(sweep), table_latex.latex(sweep, "x")):
        assert more.title in text and "hidden" in text


def finished_record(folder: Path, seed: int) -> Any:
    finished_run(config(folder, seed=seed), 0.1)
    return find_records(folder / "demo")[0]
