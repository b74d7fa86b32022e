"""LoRA: the plain model without it, trained on the answers alone, gone when it is off."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("peft")

from crl_exp.config.errors import UserError
from crl_exp.experiments.config import experiment, validate
from crl_exp.models.adapter import Adapter, weights_of
from crl_exp.runs.directory import RunDirectory
from crl_exp.steering.methods.baselines.demonstrations import demonstrations
from crl_exp.steering.methods.baselines.lora import AdaptedModel, policy_parameters
from crl_exp.steering.methods.baselines.lora_training import (
    Lesson,
    LessonReader,
    LoraTrainer,
    lessons,
)
from tests.helpers import tiny
from tests.helpers.tiny_run import lab_of, run_small, small
from tests.runs.test_resume import outcome
from tests.steering.test_parity import TASK


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    return [*tiny_files.overrides(), f"output_dir={tmp_path}", "method=lora", "method.lr=0.05"]


def adapter_of(lm, layers=(1,), targets=("q_proj", "v_proj"), rank=3, dropout=0.0) -> Adapter:
    torch.manual_seed(0)
    return Adapter(lm, layers, targets, rank, 2.0, dropout)


def moved(adapter: Adapter) -> Adapter:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.named().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return adapter


@pytest.mark.parametrize("task", [None, TASK], ids=["choices", "text"])
def test_without_updates_it_is_the_unsteered_model_bit_for_bit(task, common):
    workspace = lab_of(common, task)
    plain = workspace.prompts("test").residual_SND.clone()
    made = AdaptedModel(adapter_of(workspace.lm, layers=(0, 2)))
    mine = workspace.answer(made, "test").generation
    assert mine.tokens == workspace.baseline("test").generation.tokens
    assert torch.equal(made.read[1].residual_SND, plain)


def test_off_it_leaves_no_trace(common):
    workspace = lab_of(common)
    kinds = [type(m) for m in workspace.lm.model.modules()]
    frozen = [p.requires_grad for p in workspace.lm.model.parameters()]
    print_before = workspace.lm.fingerprint()
    adapter = moved(adapter_of(workspace.lm, targets=("q_proj", "down_proj")))
    workspace.answer(AdaptedModel(adapter), "test")
    assert [type(m) for m in workspace.lm.model.modules()] == kinds
    assert [p.requires_grad for p in workspace.lm.model.parameters()] == frozen and not any(frozen)
    workspace.lm._fingerprint = None
    assert workspace.lm.fingerprint() == print_before
    with adapter.on():
        assert type(workspace.lm.layers[1].self_attn.q_proj) is not torch.nn.Linear
    assert type(workspace.lm.layers[1].self_attn.q_proj) is torch.nn.Linear


def test_on_it_is_the_model_with_other_weights():
    """W + scale · B A, put into a copy of the model."""
    lm, copy = tiny.language_model("llama"), tiny.language_model("llama")
    adapter = moved(adapter_of(lm, targets=("q_proj", "down_proj")))
    named = adapter.named()
    with torch.no_grad():
        for place in adapter.places:
            A, B = named[f"{place.name}.A"], named[f"{place.name}.B"]
            copy.model.get_submodule(f"model.layers.{place.name}").weight += 2 * B @ A
        ids = torch.tensor([[6, 7, 8, 9, 20]])
        with adapter.on():
            logits = lm.model(ids).logits
        torch.testing.assert_close(logits, copy.model(ids).logits)
        assert not torch.allclose(logits, lm.model(ids).logits, atol=1e-2)


def test_its_parameters_are_those_of_the_known_sizes():
    """SmolLM2-135M's shape: 460,800 for q and v at rank 8, 2,442,240 for all seven."""
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    lm = SimpleNamespace(layers=model.model.layers, name="shape")
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for targets, n in ((["q_proj", "v_proj"], 460_800), (every, 2_442_240)):
        sizes = [size for layer in range(30) for _, size in weights_of(lm, layer, targets)]
        assert 8 * sum(map(sum, sizes)) == n
    gpt2 = tiny.language_model("gpt2")
    assert adapter_of(gpt2, targets=("c_attn",), rank=2).n_parameters == 2 * (32 + 96)


def test_its_rank_is_by_the_policys_parameters(common):
    result, _ = run_small([*common, "policy=linear"])
    notes, workspace = result["notes"], lab_of([*common, "policy=linear"])
    allowed = len(workspace.statistics()[1].allowed(workspace.exp.warmup.min_frequency))
    assert notes["policy_parameters"] == policy_parameters(workspace) == 33 * allowed
    per_rank = (32 + 32) + (32 + 16)
    assert notes["adapter_parameters"] == per_rank * notes["adapter_rank"]
    assert abs(notes["adapter_parameters"] - 33 * allowed) <= per_rank / 2
    assert result["layers"] == [1]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_what_is_read_while_training_is_the_models_own_forward(kind):
    """Padding, a shared prefix and a window of 6 among them."""
    lm = tiny.language_model(kind)
    prompts = [tuple(p) for p in tiny.prompts(3)]
    batch = [Lesson(prompts[0], (40,), None), Lesson(prompts[1], (41, 42, 1), None),
             Lesson(prompts[2], (43, 1), None)]  # fmt: skip
    alone = []
    for lesson in batch:
        ids = torch.tensor([[*lesson.context, *lesson.answer[:-1]]])
        hidden = lm.decoder(input_ids=ids).last_hidden_state[0]
        alone.append(hidden[len(lesson.context) - 1 :])
    for first, keep_bytes in ((0, 1e9), (2, 1e9), (2, 0)):
        reader = LessonReader(lm, batch, first, keep_bytes)
        for _ in range(2):  # what is kept of the layers below is as good the second time
            states = reader.states([0, 1, 2])
            torch.testing.assert_close(states, torch.cat(alone), atol=1e-5, rtol=1e-4)
        assert len(reader.kept) == (3 if first and keep_bytes else 0)


def test_every_answer_token_weighs_alike():
    """Gradient of answers of 1 and 3 tokens: in one batch, and from two."""
    lm = tiny.language_model("llama")
    adapter = moved(adapter_of(lm))
    batch = [Lesson(tuple(p), answer, None) for p, answer in
             zip(tiny.prompts(2), ((40,), (41, 42, 1)), strict=True)]  # fmt: skip

    reader = LessonReader(lm, batch, 1, 1e9)

    def gradient(part: list[int]) -> torch.Tensor:
        with adapter.on(training=True):
            loss = reader.loss(part, None)
            slopes = torch.autograd.grad(loss, list(adapter.named().values()))
        return torch.cat([slope.flatten() for slope in slopes])

    together = gradient([0, 1])
    apart = gradient([0]) / 4 + gradient([1]) * 3 / 4
    assert float(together.norm()) > 1e-3
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)


def test_lessons_are_the_evaluations_prompts_the_answers_and_one_end(common):
    workspace = lab_of(common, TASK)
    taught = lessons(workspace, demonstrations(workspace))
    own, read = workspace.baseline("train").generation.tokens, workspace.prompts("train").prompts
    whole = 0
    for lesson, one in zip(taught, demonstrations(workspace), strict=True):
        assert list(lesson.context) == list(read[one.item]) and lesson.option is None
        ended = len(own[one.item]) < TASK.max_new_tokens
        assert list(lesson.answer) == [*own[one.item], *([1] if ended else [])]
        whole += ended
    assert len(taught) > 3
    choice = lab_of(common)
    for lesson, one in zip(lessons(choice, demonstrations(choice)), choice.splits.train,
                           strict=True):  # fmt: skip
        assert lesson.answer == choice.options.ids[lesson.option]
        assert choice.exp.task.choices[lesson.option] == one.target


@pytest.mark.parametrize("task", [None, TASK], ids=["choices", "text"])
def test_it_learns_what_it_is_shown_and_the_best_epoch_is_taken(task, common):
    workspace = lab_of([*common, "method.epochs=6", "method.batch_size=8", "method.rank=4"], task)
    made = workspace.exp.method.prepare(workspace)
    losses = [
        line["metrics"]["loss"] for line in workspace.run.journal() if "loss" in line["metrics"]
    ]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    rewards = workspace.notes["validation_reward_by_epoch"]
    assert workspace.notes["best_epoch"] == rewards.index(max(rewards)) + 1 and len(rewards) == 6
    assert float(workspace.answer(made, "validation").reward_B.mean()) == pytest.approx(
        max(rewards)
    )
    assert not made.adapter.unmoved()


def test_dropout_is_off_when_it_answers(common):
    workspace = lab_of([*common, "method.dropout=0.5", "method.rank=4"])
    made = workspace.exp.method.prepare(workspace)
    stores = []
    for _ in range(2):
        made.read = None
        made.ready(workspace, "test")
        stores.append(made.read[1].residual_SND.clone())
    assert torch.equal(*stores)
    with made.adapter.on(training=True):
        noisy = workspace.engine.read([list(p) for p in workspace.prompts("test").prompts])
    assert not torch.equal(noisy.residual_SND, stores[0])


def test_cut_off_it_goes_on_to_the_same_end(common, monkeypatch, tmp_path):
    asked = [*common, "method.rank=2", "method.epochs=3", "method.batch_size=8",
             "checkpoint.updates=2"]  # fmt: skip
    _, folder = run_small([*asked, "sweep_name=whole"])
    update = LoraTrainer._update

    def cut(at: int):
        def stop(self) -> float:
            if self.step == at:
                raise KeyboardInterrupt
            return update(self)

        return stop

    again = [*asked, "sweep_name=cut"]
    for at in (1, 5, 8):
        monkeypatch.setattr(LoraTrainer, "_update", cut(at))
        with pytest.raises(KeyboardInterrupt):
            run_small(again)
    monkeypatch.setattr(LoraTrainer, "_update", update)
    _, other = run_small(again)
    found = [outcome(one) for one in (folder, other)]
    for one in found:
        del one["result"]["sweep"]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("method.rank=0", "method.rank=0"), ("method.targets=[]", "method.targets is empty"),
        ("method.lr=inf", "method.lr=inf"), ("method.dropout=1", "method.dropout=1.0"),
        ("engine.decode=compiled", "set engine.decode=eager"),
    ],
)  # fmt: skip
def test_what_can_not_be_trained_is_refused(more, said, common):
    with pytest.raises(UserError, match=said):
        validate(experiment(small([*common, more])))


def test_weights_that_are_not_there_are_named(common):
    workspace = lab_of([*common, "method.targets=[c_attn]", "method.rank=1"])
    with pytest.raises(UserError, match=r"layer 1 of tiny has no weights 'c_attn'.*q_proj"):
        workspace.exp.method.prepare(workspace)


def test_without_peft_one_line_says_so(common, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else found(name, *a)
    )
    with pytest.raises(UserError) as told:
        validate(experiment(small(common)))
    assert str(told.value) == "method=lora needs peft: pip install -c constraints.txt peft"


def test_a_run_leaves_its_weights_and_its_curve(common):
    _, folder = run_small(common)
    run = RunDirectory(small(common))
    assert run.path == folder
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert {name.rpartition(".")[2] for name in state["best"]} == {"A", "B"}
    assert any("validation_reward" in line["metrics"] for line in run.journal())
