"""Log-likelihood of answers under the unsteered model: against one plain pass an answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crl_exp import tracking_content
from crl_exp.controllers.base import Unsteered
from crl_exp.evaluation import evaluate_split
from tests.synthetic import config, finished_run
from tests.test_parity import TASK
from tests.tiny_run import lab_of

KEYS = [f"log_likelihood_{name}" for name in ("baseline", "steered", "delta", "delta_ci95")]


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    return [*tiny_files.overrides(), "method=corrsteer_a", "coefficient=relative",
            "engine.batch_size=7", f"output_dir={tmp_path / 'out'}"]  # fmt: skip


def directly(lab, prompt: list[int], tokens: list[int]) -> float:
    """Mean log-probability of an answer of at most five tokens, and of its end where it has one."""
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        log_prob_TV = lab.lm.model(input_ids=ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
    said = [float(log_prob_TV[t, token]) for t, token in enumerate(tokens)]
    if len(tokens) < TASK.max_new_tokens:
        ends = sorted(lab.lm.eos_ids)
        said.append(float(log_prob_TV[len(tokens), ends].logsumexp(0)))
    return float(np.mean(said))


def test_quality_is_what_a_plain_pass_gives(common):
    lab = lab_of(common, TASK)
    lab.lm.tokenizer.eos_token = "w8"  # one that this random model says now and then
    try:
        controller = lab.exp.method.prepare(lab)
        figures, steered = evaluate_split(lab, controller, "test")
        prompts = lab.prompts("test").prompts
        lengths = {len(tokens) for tokens in steered.generation.tokens}
        assert len(lengths) > 1, "no answer ended by itself"
        was, now = (
            np.array([directly(lab, p, t) for p, t in zip(prompts, made, strict=True)])
            for made in (lab.baseline("test").generation.tokens, steered.generation.tokens)
        )
    finally:
        lab.lm.tokenizer.eos_token = "<eos>"
    assert figures[KEYS[0]] == pytest.approx(was.mean(), abs=1e-4)
    assert figures[KEYS[1]] == pytest.approx(now.mean(), abs=1e-4)
    assert figures[KEYS[2]] == pytest.approx((now - was).mean(), abs=1e-4)
    half = 1.96 * (now - was).std(ddof=1) / len(was) ** 0.5
    low, high = figures[KEYS[3]]
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
    # Greedy answers are likelier under the model that gave them.
    assert figures[KEYS[2]] < 0


def test_the_unsteered_model_against_itself_is_zero(common):
    lab = lab_of(common, TASK)
    figures, _ = evaluate_split(lab, Unsteered(), "test")
    assert figures[KEYS[2]] == 0 and figures[KEYS[3]] == [0, 0] and figures[KEYS[0]] < 0


def test_it_is_null_for_choices_and_on_validation(common):
    figures, _ = evaluate_split(lab_of(common), Unsteered(), "test")
    assert [figures[key] for key in KEYS] == [None] * 4
    figures, _ = evaluate_split(lab_of(common, TASK), Unsteered(), "validation")
    assert [figures[key] for key in KEYS] == [None] * 4


def test_it_is_in_mlflow_where_there_is_one(tmp_path):
    """And nothing of it for results of earlier versions, or for choices."""
    values = dict.fromkeys(KEYS[:3], -1.5)
    run = finished_run(config(tmp_path), 0.1, **values, log_likelihood_delta_ci95=[-1, 1])
    sent = {p.name: p.value for p in tracking_content.final_points(run.result() or {}, 0)}
    assert sent["eval/log_likelihood_steered"] == -1.5
    assert not [name for name in sent if name.startswith("eval_validation/log")]
    old = finished_run(config(tmp_path, seed=1), 0.1)
    sent = {p.name for p in tracking_content.final_points(old.result() or {}, 0)}
    assert not [name for name in sent if "log_likelihood" in name]
