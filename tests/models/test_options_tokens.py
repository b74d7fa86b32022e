"""Options of several tokens: chosen as by running every option whole, and learned from rightly."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from torch import Tensor

from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.generation.engine import Engine, EngineConfig, Job
from crl_exp.models.choice import Options, options_of
from crl_exp.models.language_model import LanguageModel
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.controllers.observer import Observer
from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.methods.residual_means import ResidualObserver
from crl_exp.steering.policy import sampling as selection
from crl_exp.steering.policy.learner import LayerLearner, collect
from crl_exp.steering.stages.mask import Generation
from tests.config.test_bad_input import refused
from tests.helpers import tiny
from tests.helpers.tiny_run import lab_of, run_small, small, write_task
from tests.helpers.tiny_steering import AddVector, agent, grpo, pipeline, ppo, random_sae

PROMPTS = tiny.prompts(7)
IDS = ((11, 12, 13), (20,), (11, 31), (40, 41, 42, 43), (50, 51))
"""Of one token to four; two share the first."""
ALIKE = ((11, 12), (21, 31), (11, 43), (50, 51), (20, 60), (33, 34, 35))


@cache
def model(kind: str) -> LanguageModel:
    return tiny.language_model(kind)


def engine(kind: str, batch_size: int | str = 8) -> Engine:
    return Engine(model(kind), EngineConfig(batch_size, 1.0, "eager"))


def vectors(seed: int, *sites: int) -> dict[int, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {site: 3.0 * torch.randn(tiny.D_MODEL, generator=draw) for site in sites}


@torch.no_grad()
def whole(
    lm: LanguageModel, prompt: list[int], added: dict[int, Tensor], option: tuple[int, ...]
) -> tuple[float, dict[int, Tensor]]:
    """log p(option | prompt) by one run over all of it with plain hooks, and the residuals [T, D]
    at the steered tokens, before anything is added there."""
    start, seen = len(prompt) - 1, {}

    def hook(site: int, hidden: Tensor) -> Tensor:
        seen[site] = hidden[0, start:].clone()
        hidden = hidden.clone()
        hidden[:, start:] += added.get(site, torch.zeros(tiny.D_MODEL))
        return hidden

    sites = range(-1, lm.n_layers)
    handles = [lm.hook(site, lambda h, site=site: hook(site, h)) for site in sites]
    logits = lm.model(torch.tensor([[*prompt, *option[:-1]]])).logits[0, start:]
    for handle in handles:
        handle.remove()
    logp = logits.log_softmax(-1)
    return float(sum(logp[t, token] for t, token in enumerate(option))), seen


def best(lm: LanguageModel, prompt: list[int], added: dict, options: Options) -> int:
    scores = [whole(lm, prompt, added, ids)[0] for ids in options.ids]
    if options.length_normalised:
        scores = [score / len(ids) for score, ids in zip(scores, options.ids, strict=True)]
    return max(range(len(scores)), key=lambda o: scores[o])


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["llama", *(pytest.param(k, marks=pytest.mark.slow) for k in tiny.KINDS if k != "llama")],
)
def test_an_option_is_chosen_as_by_running_each_whole(kind: str, normalised: bool) -> None:
    """Ragged prompts, several jobs in one call at different sites, batches smaller than the rows;
    Gemma-2's window of 6 and its caps among the models."""
    ids = IDS if normalised else ALIKE  # where lengths differ the shortest wins nearly always
    lm, options = model(kind), Options(ids, normalised)
    plans = [{}, vectors(1, -1), vectors(2, 1), vectors(3, 0, 2), vectors(4, 3)]
    expected = [[best(lm, p, plan, options) for p in PROMPTS] for plan in plans]
    assert len({o for row in expected for o in row}) > 2, "the answers tell nothing apart"
    for size in (64, 11, 1):
        made = engine(kind, size)
        jobs = [Job(AddVector(p) if p else Unsteered(), range(len(PROMPTS))) for p in plans]
        jobs[2] = Job(jobs[2].controller, [6, 2, 2])
        answers = made.generate(made.read(PROMPTS), jobs, 1, options)
        for row, job, answer in zip(expected, jobs, answers, strict=True):
            assert answer.tokens == [list(ids[row[item]]) for item in job.items]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_options_of_one_token_are_chosen_as_ever(kind: str) -> None:
    """And by the log-probabilities too: the cap that is left out changes no order."""
    lm, ids = model(kind), [11, 20, 40, 50]
    made = engine(kind)
    store, job = made.read(PROMPTS), [Job(AddVector(vectors(1, 1)), range(len(PROMPTS)))]
    was = made.generate(store, job, 1, ids, record=True)[0]
    now = made.generate(store, job, 1, Options(tuple((i,) for i in ids)), record=True)[0]
    assert was.tokens == now.tokens and len(was.steps) == len(now.steps) == 1
    assert torch.equal(was.steps[0].action.delta_BD, now.steps[0].action.delta_BD)
    best_of = [best(lm, p, vectors(1, 1), Options(tuple((i,) for i in ids))) for p in PROMPTS]
    assert was.tokens == [[ids[o]] for o in best_of]


def watched(controller: Controller, size: int = 8) -> list[int]:
    """The option that each row takes, with the controller looking on."""
    made = engine("llama", size)
    tokens = made.generate(
        made.read(PROMPTS), [Job(controller, range(len(PROMPTS)))], 1, Options(IDS)
    )[0].tokens
    return [IDS.index(tuple(ids)) for ids in tokens]


@pytest.mark.parametrize("size", [64, 5])
@pytest.mark.parametrize("pooling", ["max", "mean", "last_prompt"])
def test_stage_1_sees_the_tokens_of_the_option_taken(pooling: str, size: int) -> None:
    sae = random_sae(2, tiny.D_MODEL)
    observer = Observer({2: sae}, pooling)
    taken, n_seen = watched(observer, size), 0
    for row, (prompt, option) in enumerate(zip(PROMPTS, taken, strict=True)):
        acts_TF = sae.encode(whole(model("llama"), prompt, {}, IDS[option])[1][2])
        n_seen += len(acts_TF)
        expected = {"max": acts_TF.amax(0), "mean": acts_TF.mean(0), "last_prompt": acts_TF[0]}
        torch.testing.assert_close(observer.pooled_BF[2][row], expected[pooling])
    assert observer.residuals[2].moments.n == n_seen


def test_residual_means_are_of_the_option_taken() -> None:
    observer = ResidualObserver({2: 2}, last_prompt=False)
    for row, (prompt, option) in enumerate(zip(PROMPTS, watched(observer), strict=True)):
        seen_TD = whole(model("llama"), prompt, {}, IDS[option])[1][2]
        torch.testing.assert_close(observer.mean(2)[row].float(), seen_TD.mean(0))


def explored(size: int = 64, n: int = 7, seed: int = 0, **changes):
    """A policy with a mask that remembers the answer's tokens, its answers and its own agent."""
    stages = pipeline(mask=Generation())
    made = agent(random_sae(2, tiny.D_MODEL), tiny.D_MODEL, stages, scale=0.3, k=1, **changes)
    draw = torch.Generator().manual_seed(seed)
    machine = engine("llama", size)
    job = Job(PolicyController({2: made}, Decay(0.9), draw), range(n))
    return made, machine.generate(machine.read(PROMPTS), [job], 1, Options(IDS), record=True)[0]


def test_the_acts_at_every_options_tokens_are_recorded_once() -> None:
    _, played = explored()
    taken = [IDS.index(tuple(ids)) for ids in played.tokens]
    acts = {(-1, s.token_index, row) for s in played.steps for row in s.rows}
    assert acts == {(-1, t, row) for row, o in enumerate(taken) for t in range(len(IDS[o]))}
    for step in played.steps:
        assert step.token_B is not None and bool(step.alive_B.all())
        assert step.token_B.tolist() == [IDS[taken[r]][step.token_index] for r in step.rows]
    others = [(s.option, s.token_index, row) for s in played.others for row in s.rows]
    assert len(set(others)) == len(others)
    assert set(others) == {
        (o, t, row)
        for row in range(7)
        for o, ids in enumerate(IDS)
        for t in range(1, len(ids))
        if o != taken[row]
    }


def test_options_of_a_row_explore_independently() -> None:
    """With the same numbers for all, the product of the acts' probabilities would not be that of
    all of them. Options 0 and 2 begin alike, so at their second token they see the same."""
    stages = pipeline()
    made = agent(random_sae(2, tiny.D_MODEL), tiny.D_MODEL, stages, scale=0.0, k=1)
    machine = engine("llama", 64)
    store, pairs = machine.read(PROMPTS), []
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        job = Job(PolicyController({2: made}, Decay(1.0), draw), range(7))
        played = machine.generate(store, [job], 1, Options(((11, 12), (11, 31))), record=True)[0]
        (mine,) = [s for s in played.steps if s.token_index == 1]
        other = {r: f for s in played.others for r, f in _features(s)}
        pairs += [(feature, other[row]) for row, feature in _features(mine)]
    alike = sum(a == b for a, b in pairs) / len(pairs)
    assert len(pairs) == 84 and alike < 0.3, "one of 15 by chance"


def _features(step) -> list[tuple[int, int]]:
    return list(zip(step.rows, step.action.feature_idx_BK[:, 0].tolist(), strict=True))


def test_the_same_acts_in_any_batch() -> None:
    _, together = explored(size=64)
    for size in (1, 9):
        _, apart = explored(size=size)
        assert apart.tokens == together.tokens
        for a, b in ((apart.steps, together.steps), (apart.others, together.others)):
            for one, other in zip(a, b, strict=True):
                assert one.rows == other.rows and one.option == other.option
                assert torch.equal(one.action.feature_idx_BK, other.action.feature_idx_BK)


@pytest.mark.parametrize("algorithm", [ppo(), grpo(group_size=7)])
def test_the_ratio_is_one_and_every_act_is_learned_from(algorithm) -> None:
    made, played = explored(with_critic=algorithm.uses_critic)
    reward_B = torch.arange(7.0) / 6
    rollout = collect(2, played, reward_B, algorithm)
    n_acts = 7 * (1 + sum(len(ids) - 1 for ids in IDS))
    assert len(rollout.log_prob_N) == n_acts
    now = made.distribution(rollout.observed)
    log_prob_N = selection.log_prob(now.logits_BC, rollout.choice_NK)
    torch.testing.assert_close(log_prob_N, rollout.log_prob_N, atol=1e-5, rtol=0)
    assert torch.equal(rollout.return_N, reward_B[rollout.episode_N])
    learner = LayerLearner(made, algorithm)
    learner.update(rollout, 1, torch.Generator().manual_seed(0))
    assert learner.first_ratio_N is not None
    torch.testing.assert_close(learner.first_ratio_N, torch.ones(n_acts), atol=1e-5, rtol=0)


def test_advantages_of_options_that_were_not_taken() -> None:
    """λ = 1: A = r − V(s) at every act, of whichever option."""
    _, played = explored()
    reward_B = torch.arange(7.0) / 6
    rollout = collect(2, played, reward_B, ppo(gae_lambda=1.0))
    steps = [*played.steps, *sorted(played.others, key=lambda s: s.option or 0)]
    by_act = {
        (-1 if s.option is None else s.option, s.token_index, row): float(value)
        for s in steps
        if s.action.value_B is not None
        for row, value in zip(s.rows, s.action.value_B, strict=True)
    }
    values = sorted(float(reward_B[row]) - value for (_, _, row), value in by_act.items())
    assert rollout.advantage_N.sort().values.tolist() == pytest.approx(values, abs=1e-5)


# --- texts and tokenizers ---


def sentencepiece(words: list[str], dummy_prefix: bool = True):
    """As Llama-2's and Mistral v0.1's: a space is written ▁, and one stands before any text."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({c for word in words for c in word} | set("▁:abcdefghijklmnopqrstuvwxyz"))
    pieces = ["<unk>", "<s>", "</s>", *letters]
    merges = []
    for word in words:  # each word one piece, made from its beginning
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    raw = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>")
    )
    steps = [normalizers.Prepend("▁")] if dummy_prefix else []
    raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def pieces(tokenizer, texts: list[str], normalised: bool = False) -> list[list[str]]:
    options = options_of(tokenizer, texts, normalised, "tiny")
    return [tokenizer.convert_ids_to_tokens(list(ids)) for ids in options.ids]


def test_a_tokenizer_with_a_space_mark() -> None:
    """The mark belongs to the word, whether a space was given before it or not."""
    made = sentencepiece(["▁yes", "▁no", "▁A", "▁B"])
    assert pieces(made, ["yes", "no"]) == [["▁yes"], ["▁no"]]
    assert pieces(made, [" A", " B"]) == [["▁A"], ["▁B"]], "not ▁ and ▁A: a second space"
    assert pieces(made, ["maybe", "no"])[0] == ["▁", *"maybe"], "begins with the mark alone"
    assert pieces(made, ["big", "bad"]) == [["▁", *"big"], ["▁", *"bad"]], "share the first token"


def test_a_tokenizer_without_one_takes_the_space_that_is_given() -> None:
    made = sentencepiece(["▁yes", "yes", "▁no", "no"], dummy_prefix=False)
    assert pieces(made, ["yes", "no"]) == [["yes"], ["no"]]
    assert pieces(made, [" yes", " no"]) == [["▁yes"], ["▁no"]]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["w1 w2", "w1"], "'w1 w2' begins with all tokens of 'w1'.*task.length_normalised=true"),
        (["w1", "w1 "], "are the same tokens"), (["w1", "zebra"], "no tokens for 'zebra'"),
        (["w1", " "], "' ' is no token at all"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_told_apart_are_refused(texts, says) -> None:
    with pytest.raises(UserError, match=says):
        options_of(tiny.tokenizer(), texts, False, "tiny")


def test_by_length_an_option_may_begin_with_another() -> None:
    assert options_of(tiny.tokenizer(), ["w1", "w1 w2"], True, "tiny").longest == 2


# --- whole experiments ---

ANSWERS = ("w1 w2", "w3", "w1 w5 w6")


@pytest.fixture
def several(tiny_files, tmp_path) -> list[str]:
    path = write_task(tmp_path / "task.jsonl", n=80, answers=ANSWERS)
    return [
        *tiny_files.overrides(), f"task.path={path}", f"task.choices=[{','.join(ANSWERS)}]",
        "task.length_normalised=true", f"output_dir={tmp_path / 'out'}",
    ]  # fmt: skip


METHODS = ["method=none", "method=corrsteer_p layers=list", "method=crl mask=generation"]


@pytest.mark.parametrize("method", METHODS)
def test_answers_of_several_tokens_can_be_right(several, method) -> None:
    result, path = run_small([*several, *method.split()])
    assert result["invalid_baseline"] == result["invalid_steered"] == 0
    assert 0 < result["accuracy_baseline"] < 1
    assert result["notes"]["option_tokens"] == {"w1 w2": 2, "w3": 1, "w1 w5 w6": 3}
    if method.startswith("method=crl"):
        steps = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]
        assert any("layer_1/policy_loss" in json.dumps(step) for step in steps)


def test_crl_with_fixed_features_answers_as_corrsteer(several) -> None:
    """Parity holds where answers are options of several tokens."""
    several = [*several, "coefficient=relative"]
    workspace = lab_of([*several, "method=corrsteer_s"])
    controller, _ = workspace.exp.layers.prepare(workspace)
    expected = workspace.answer(controller, "test").generation.tokens
    other = lab_of([*several, "method=crl", "method.stage2=false", "method.features=fixed"])
    made, _ = other.exp.layers.prepare(other)
    assert other.answer(made, "test").generation.tokens == expected
    assert expected != workspace.answer(Unsteered(), "test").generation.tokens


@pytest.mark.slow
def test_packed_runs_answer_as_alone(several, tmp_path) -> None:
    from crl_exp.experiments.packing import run_pack

    runs = [["seed=0"], ["seed=1"], ["method=corrsteer_s"]]
    alone = [run_small([*several, *one])[0] for one in runs]
    configs = [small([*several, *one, f"output_dir={tmp_path / 'packed'}"]) for one in runs]
    for one, other in zip(alone, run_pack(configs), strict=True):
        assert isinstance(other, dict)
        for figure in ("accuracy_baseline", "accuracy_steered", "delta", "unique_features"):
            assert one[figure] == other[figure]


def test_options_that_one_token_cannot_tell_apart_are_refused(several) -> None:
    assert "task.length_normalised=true" in refused(
        [*several, "task.length_normalised=false", "task.choices=[w1 w2,w3,w1 w5 w6,w1]"]
    )


@pytest.mark.parametrize(
    "texts",
    [(" yes", "<eos>"), (" w5", " w6"), ("yes  w5", "no\tw6", "<eos> w7"), ("w5 w9 ", " w6  w7")],
)
def test_answers_are_the_options_letter_by_letter(texts: tuple[str, ...]) -> None:
    """Read back from their tokens they lose spaces, and a special token altogether."""
    lm, made = model("llama"), engine("llama")
    options = options_of(lm.tokenizer, texts, False, "tiny")
    assert options == Options(options.ids), "what is kept of the same tokens stays"
    store, seen = made.read(PROMPTS), set()
    for seed in range(8):
        job = Job(AddVector(vectors(seed, 2)), range(len(PROMPTS)))
        answers = made.generate(store, [job], 1, options, stop=["w6", "s"])[0]
        taken = [options.ids.index(tuple(tokens)) for tokens in answers.tokens]
        assert answers.texts == [texts[option] for option in taken]
        seen |= set(taken)
    assert seen == set(range(len(texts))), "each was taken once"


def test_an_option_that_is_read_off_is_its_text(tiny_files, tmp_path) -> None:
    from crl_exp.steering.methods.baselines.options import answered

    common = [*tiny_files.overrides(), f"output_dir={tmp_path}", "task.choice_prefix=' '"]
    workspace = lab_of(common)
    assert answered(workspace, [1, 0]).texts == [" no", " yes"]
    assert set(workspace.baseline("test").generation.texts) <= {" no", " yes"}
