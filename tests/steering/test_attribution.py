"""Attribution: gradients by what steering adds, against central differences and by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from crl_exp.config.errors import UserError
from crl_exp.generation import teacher_forcing
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.generation.results import Generation, Job
from crl_exp.generation.teacher_forcing import Forced
from crl_exp.models.language_model import LanguageModel
from crl_exp.steering.methods.attribution import Attribution, mean_gradient, ranked, scores
from tests.helpers import tiny
from tests.helpers.tiny_run import LAYERS, lab_of
from tests.helpers.tiny_steering import AddVector
from tests.steering.test_parity import TASK

ANSWERS = [Forced([10, 20, 30], True), Forced([11], False), Forced([], True), Forced([12, 9], True)]
WEIGHT_T = 0.5 ** torch.arange(6, dtype=torch.float64)
EOS = (1, 7)


def exact(kind: str) -> LanguageModel:
    """A tiny model in float64, with two end tokens. transformers' own norms of Llama and Gemma work
    in float32 whatever they are given, which differences of 1e-5 can't be taken through."""
    lm = tiny.language_model(kind)
    lm.model.double()
    lm.model.generation_config.eos_token_id = list(EOS)  # type: ignore[union-attr]
    for norm in lm.model.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.forward = partial(rms_norm, norm, kind == "gemma2")  # type: ignore[method-assign]
    return lm


def rms_norm(norm: nn.Module, one_more: bool, x: Tensor) -> Tensor:
    epsilon = norm.eps if one_more else norm.variance_epsilon
    scale = norm.weight + 1 if one_more else norm.weight
    return scale * x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()  # type: ignore[operator]


@pytest.fixture
def exact_softmax(monkeypatch) -> None:
    """Eager attention, Gemma-2's here, asks for float32."""
    real = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: real(x, dim))


def plainly(
    lm: LanguageModel, prompt: list[int], answer: Forced, added: dict[int, Tensor]
) -> Tensor:
    """Log-probabilities of an answer's tokens and end by one pass over everything, no cache.

    added: by site, a vector that is added from the last prompt token on, times WEIGHT_T.
    """
    first = len(prompt) - 1
    ids = torch.tensor([[*prompt, *answer.tokens]])

    def adding(site: int):
        def add(hidden_BTD: Tensor) -> Tensor:
            n = hidden_BTD.shape[1] - first
            hidden_BTD = hidden_BTD.clone()
            hidden_BTD[0, first:] += WEIGHT_T[:n, None].to(hidden_BTD) * added[site]
            return hidden_BTD

        return lm.hook(site, add)

    handles = [adding(site) for site in added]
    with torch.no_grad():
        log_prob_TV = lm.model(input_ids=ids).logits[0, first:].log_softmax(-1)
    for handle in handles:
        handle.remove()
    said = [log_prob_TV[t, token] for t, token in enumerate(answer.tokens)]
    end = [log_prob_TV[len(said), list(EOS)].logsumexp(0)] if answer.ended else []
    return torch.stack([*said, *end])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_gradients_equal_central_differences(kind, exact_softmax):
    """At every site, prompts of several lengths and answers of several tokens in one batch; the
    objective weighs answers, so that no row goes unseen. Gemma-2 has soft caps and a window."""
    lm = exact(kind)
    prompts = tiny.prompts(4, seed=3)
    batch = Engine(lm, EngineConfig(8, 1.0, "eager")).read(prompts).batch(range(4))
    weight_B = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)

    def objective(logits_BTV: Tensor) -> Tensor:
        log_prob_BT = teacher_forcing.log_probs(lm, logits_BTV, ANSWERS)
        return (weight_B * log_prob_BT.sum(1)).sum()

    gradient_SD = teacher_forcing.gradients(lm, batch, ANSWERS, objective, WEIGHT_T)
    draw = torch.Generator().manual_seed(0)
    step = 1e-5
    for site in range(-1, lm.n_layers):
        along_D = torch.randn(lm.d_model, generator=draw, dtype=torch.float64)

        def total(by: float, site: int = site, along_D: Tensor = along_D) -> float:
            return sum(
                float(weight * plainly(lm, prompt, answer, {site: by * along_D}).sum())
                for weight, prompt, answer in zip(weight_B, prompts, ANSWERS, strict=True)
            )

        by_difference = (total(step) - total(-step)) / (2 * step)
        assert float(gradient_SD[site + 1] @ along_D) == pytest.approx(by_difference, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_log_probabilities_are_the_models_own(kind, exact_softmax):
    lm = exact(kind)
    prompts = tiny.prompts(4, seed=5)
    batch = Engine(lm, EngineConfig(8, 1.0, "eager")).read(prompts).batch(range(4))
    made_BTV = teacher_forcing.logits(lm, batch, ANSWERS)
    found_BT = teacher_forcing.log_probs(lm, made_BTV, ANSWERS)
    for row, (prompt, answer) in enumerate(zip(prompts, ANSWERS, strict=True)):
        wanted_T = plainly(lm, prompt, answer, {})
        torch.testing.assert_close(found_BT[row, : answer.n_scored], wanted_T)
        assert not found_BT[row, answer.n_scored :].any()


def test_the_steered_positions_are_the_engines():
    """A vector far too long to be a detail: the answers that the engine gives under it are, token
    by token, the likeliest under the pass that gradients are taken of."""
    lm = exact("llama")
    prompts, vector_D = tiny.prompts(6), torch.linspace(-1, 1, tiny.D_MODEL, dtype=torch.float64)
    store = Engine(lm, EngineConfig(8, 1.0, "eager")).read(prompts)
    job = Job(AddVector({2: vector_D}), range(6))
    (made,) = Engine(lm, EngineConfig(8, 1.0, "eager")).generate(store, [job], 4)
    answers = teacher_forcing.forced(lm, made, 4, [])
    handle = lm.hook(2, lambda hidden_BTD: hidden_BTD + vector_D)
    with torch.no_grad():
        best_BT = teacher_forcing.logits(lm, store.batch(range(6)), answers).argmax(-1)
    handle.remove()
    for row, answer in enumerate(answers):
        assert best_BT[row, : len(answer.tokens)].tolist() == list(answer.tokens)
        assert not answer.ended or int(best_BT[row, len(answer.tokens)]) in EOS


def test_which_answers_ended_by_themselves():
    """Four tokens at most: one that used them all hasn't; nor has one that wrote a stop text."""
    lm = tiny.language_model("llama")
    made = Generation([[10, 20], [10, 20, 30, 31], [10, 9]], ["", "", ""])
    ended = [answer.ended for answer in teacher_forcing.forced(lm, made, 4, [])]
    assert ended == [True, False, True]
    stop = [lm.tokenizer.decode([9])]
    assert [a.ended for a in teacher_forcing.forced(lm, made, 4, stop)] == [True, False, False]


def test_scores_by_hand():
    """M = w·x with w (1, 2): predicted is real. Rows (1, 0), (0, 1), (.6, −.8)."""
    W_dec_FD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, -0.8]])
    found = scores(torch.tensor([1.0, 2.0]), W_dec_FD, torch.ones(3))
    assert found.tolist() == pytest.approx([1.0, 2.0, -1.0])
    halved = scores(torch.tensor([1.0, 2.0]), W_dec_FD, torch.tensor([2.0, 0.5, 1.0]))
    assert halved.tolist() == pytest.approx([2.0, 1.0, -1.0])


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    sizes = ["task.n_train=24", "task.n_validation=16", "task.n_test=4"]
    return [*tiny_files.overrides(), *sizes, "layers=all", "method=attribution",
            f"output_dir={tmp_path / 'out'}"]  # fmt: skip


def target_log_likelihood(workspace, added: dict[int, Tensor]) -> float:
    """Mean over the training items, among the options, in nats."""
    total = 0.0
    for item in workspace.splits.train:
        prompt = workspace.lm.prompt_ids(item.user, workspace.exp.task.chat_template)
        tokens = workspace.options.one_token
        score = [
            plainly(workspace.lm, prompt, Forced([token], False), added)[0] for token in tokens
        ]
        right = workspace.exp.task.choices.index(item.target)
        total += float(torch.stack(score).log_softmax(0)[right])
    return total / len(workspace.splits.train)


@pytest.mark.slow
def test_the_predicted_change_is_the_real_one(common):
    """Of the best and the worst feature of each layer, for a small dose, through the whole model.
    Batches of one size or another give the same."""
    workspace = lab_of([*common, "engine.batch_size=5"])
    everything = ranked(workspace, "target")
    unsteered = target_log_likelihood(workspace, {})
    for layer in LAYERS:
        of_layer = [pair for pair in everything if pair[0].layer == layer]
        for steer, score in (of_layer[0], of_layer[-1]):
            row_D = workspace.saes[layer].W_dec_FD[steer.feature_idx]
            dose = 0.01 * steer.coefficient
            real = target_log_likelihood(workspace, {layer: dose * row_D}) - unsteered
            assert real / 0.01 == pytest.approx(score, rel=0.1, abs=1e-3)
    other = mean_gradient(lab_of([*common, "engine.batch_size=16"]), "target")
    torch.testing.assert_close(mean_gradient(workspace, "target"), other, rtol=1e-4, atol=1e-6)


def test_shuffled_labels_have_a_gradient_of_their_own(common):
    """Of the permuted targets: it is what the log-likelihood of those would gain."""
    true = mean_gradient(lab_of(common), "auto")
    workspace = lab_of([*common, "task.shuffle_labels=true"])
    shuffled = mean_gradient(workspace, "auto")
    assert not torch.allclose(true, shuffled, atol=1e-4)
    along_D = shuffled[2].float()
    gain = target_log_likelihood(workspace, {1: 1e-2 * along_D}) - target_log_likelihood(
        workspace, {}
    )
    assert gain / 1e-2 == pytest.approx(float(shuffled[2] @ shuffled[2]), rel=0.1)


def test_the_feature_of_the_steepest_rise_is_steered(common):
    """And by which multiplier, validation says."""
    workspace = lab_of(common)
    (steer,) = workspace.exp.method.select(workspace)  # type: ignore[attr-defined]
    best, score = ranked(workspace, "auto")[0]
    assert (steer.layer, steer.feature_idx) == (best.layer, best.feature_idx)
    assert steer.coefficient / best.coefficient == pytest.approx(workspace.notes[
        f"multiplier for layers [{best.layer}]"])  # fmt: skip
    (noted,) = workspace.notes["attribution"]
    assert noted["predicted_nats"] == score > 0 and noted["chosen"]


def test_a_feature_that_lowers_it_is_taken_away(common):
    """warmup.negative=steer: ranked by the size, the sign being the score's and not r's; as much is
    taken away as there is in failure."""
    common = [*common, "coefficient=mean_positive"]
    kept = ranked(lab_of(common), "auto")
    workspace = lab_of([*common, "warmup.negative=steer"])
    steered = ranked(workspace, "auto")
    signed = {(s.layer, s.feature_idx): (s, score) for s, score in kept}
    assert [score for _, score in steered] == sorted((x for _, x in steered), reverse=True)
    differ = 0
    for steer, score in steered:
        before, predicted = signed[steer.layer, steer.feature_idx]
        listed = float(workspace.coefficients(steer.layer)[steer.feature_idx])  # in features.json
        assert listed == steer.coefficient
        if predicted >= 0:
            assert (steer, score) == (before, predicted)
            continue
        failing = workspace.statistics()[steer.layer].by_feature["mean_unrewarded"]
        assert steer.coefficient == pytest.approx(-float(failing[steer.feature_idx]), abs=1e-6)
        by = steer.coefficient / before.coefficient
        assert score == pytest.approx(by * predicted, rel=1e-5, abs=1e-7)
        differ += abs(by + 1) > 0.01
    assert differ


def test_free_text_goes_by_the_reward(common):
    """By hand: the sum over items of (reward − mean) · ∂ log p(unsteered answer), over n."""
    workspace = lab_of(
        [*common, "engine.batch_size=7", "decay=exponential", "decay.gamma=0.5"], TASK
    )
    found_SD = mean_gradient(workspace, "auto")
    answers = workspace.baseline("train")
    given = teacher_forcing.forced(workspace.lm, answers.generation, TASK.max_new_tokens, [])
    advantage_I = answers.reward_B - answers.reward_B.mean()
    assert advantage_I.any()
    along_D, step = found_SD[2].float() / found_SD[2].float().norm(), 1e-2
    n = len(given)

    def total(by: float) -> float:
        return sum(
            float(a * plainly(workspace.lm, prompt, answer, {1: by * along_D}).double().sum()) / n
            for a, prompt, answer in zip(
                advantage_I, workspace.prompts("train").prompts, given, strict=True
            )
        )

    by_difference = (total(step) - total(-step)) / (2 * step)
    assert float(found_SD[2].float() @ along_D) == pytest.approx(by_difference, rel=0.02)


def test_what_it_cannot_do_is_told(common):
    free = ["task.choices=null", "task.max_new_tokens=4"]
    with pytest.raises(UserError, match=r"method\.objective=target needs.*objective=reward"):
        lab_of([*common, *free, "method.objective=target"])
    with pytest.raises(UserError, match=r"method\.objective=rewards.*reward"):
        lab_of([*common, "method.objective=rewards"])
    workspace = lab_of(common, TASK)
    assert isinstance(workspace.exp.method, Attribution)
    answers = workspace.baseline("train")
    for score in answers.scores:
        object.__setattr__(score, "reward", 1.0)
    with pytest.raises(UserError, match=r"a reward of 1 for all.*n_train"):
        mean_gradient(workspace, "reward")
