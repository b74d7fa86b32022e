"""task.scorer=preference_model, on tiny random classifiers of real architectures in folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from crl_exp.config.errors import UserError
from crl_exp.config.keys import run_key, settle
from crl_exp.config.sections import build
from crl_exp.tasks.base import Item, Task
from crl_exp.tasks.jsonl import JsonLines
from tests.helpers import tiny
from tests.helpers.tiny_run import quickly_composed, run_small

ITEMS = [Item(f"id{n}", f"w{n} w1 w{n + 2}") for n in range(5)]
OUTPUTS = ["w3", "yes w4 w4 w9 w9 w9", "", "no", "w7 w8"]


def save(folder: Path, kind: str = "llama", chat: bool = True, labels: int = 1) -> Path:
    torch.manual_seed(1)
    shape = {
        "vocab_size": len(tiny.WORDS), "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": labels,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.5,
    }  # fmt: skip
    if kind == "llama":
        made = LlamaForSequenceClassification(LlamaConfig(**shape, num_key_value_heads=1))
    elif kind == "roberta":
        made = RobertaForSequenceClassification(
            RobertaConfig(**shape, max_position_embeddings=66, type_vocab_size=1)
        )
    else:
        assert kind == "gpt2"  # as it comes: without a token for padding
        gpt2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "num_labels": labels}
        made = GPT2ForSequenceClassification(
            GPT2Config(vocab_size=len(tiny.WORDS), initializer_range=0.5, **gpt2)
        )
    made.save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    if not chat:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "preference_model"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("llama"))


def typed(folder: Path, model: Path | str, *more: str) -> list[str]:
    rows = [{"question": f"w{n % 58} w{n // 2} w1"} for n in range(60)]
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["task=jsonl", f"task.path={path}", "task.choices=null", "task.max_new_tokens=2",
            "task.n_train=24", "task.n_validation=8", "task.n_test=16",
            "task.scorer=preference_model", f"task.preference_model.path={model}",
            "task.preference_model.batch_size=3", *more]  # fmt: skip


def task_of(overrides: list[str]) -> JsonLines:
    config = quickly_composed(overrides)
    settle(config)
    made = build(config.task, "task", Task)
    assert isinstance(made, JsonLines)
    return made


@torch.no_grad()
def own_logit(folder: Path, prompt: str, answer: str, chat: bool) -> float:
    """transformers' own forward of one answer alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    if chat:
        text = f"<user> {prompt} <user> {answer} <bot>"  # as the tiny template has every turn
        fed = tiny.tokenizer()(text, return_tensors="pt", add_special_tokens=False)
    else:
        fed = tiny.tokenizer()(prompt, answer, return_tensors="pt")
    return float(model(**fed).logits[0, 0])


@pytest.mark.parametrize(
    ("kind", "chat"), [("llama", True), ("llama", False), ("roberta", False), ("gpt2", True)]
)
def test_rewards_are_the_sigmoid_of_what_the_model_says_of_each_alone(kind, chat, tmp_path):
    folder = save(tmp_path / kind, kind, chat)
    task = task_of(typed(tmp_path, folder))
    logits = [own_logit(folder, i.user, o, chat) for i, o in zip(ITEMS, OUTPUTS, strict=True)]
    assert max(logits) - min(logits) > 0.05, "a model that tells answers apart"
    scores = task.score(ITEMS, OUTPUTS)
    assert [one.reward for one in scores] == pytest.approx(
        [1 / (1 + math.exp(-logit)) for logit in logits], abs=1e-5
    )
    assert [one.valid for one in scores] == [True, True, False, True, True]
    assert task.told()["preference_model"]["read_as"] == ("conversation" if chat else "text pair")


def test_a_rank_is_the_share_of_the_unsteered_answers_below_it(llama, tmp_path):
    task = task_of(typed(tmp_path, llama, "task.preference_model.map=rank"))
    with pytest.raises(UserError, match=r"set task\.preference_model\.map=sigmoid"):
        task.score(ITEMS, OUTPUTS)
    task.take_unsteered(ITEMS, OUTPUTS)
    logits = task.preference.logits(ITEMS, OUTPUTS)
    order = sorted(range(5), key=lambda n: logits[n])
    expected = [(order.index(n) + 0.5) / 5 for n in range(5)]
    assert [one.reward for one in task.score(ITEMS, OUTPUTS)] == pytest.approx(expected)
    assert task.preference.reward(min(logits) - 1) == 0 and task.preference.reward(1e9) == 1
    task.take_unsteered(ITEMS[:1] * 2 + ITEMS[1:2], OUTPUTS[:1] * 2 + OUTPUTS[1:2])  # ties
    assert task.preference.reward(logits[0]) in (2 / 6, 4 / 6)


def test_the_same_content_is_read_once_by_any_process(llama, tmp_path, cache):
    overrides = typed(tmp_path, llama)
    first, second = task_of(overrides), task_of(overrides)
    rewards = first.score(ITEMS + ITEMS, OUTPUTS + OUTPUTS)
    assert first.preference.counts == {"scored": 5, "kept": 5}
    assert second.score(ITEMS, OUTPUTS) == rewards[:5]
    assert second.preference.counts == {"scored": 0, "kept": 5}
    second.score(ITEMS[:1], ["w5"])
    first.score(ITEMS[:1], ["w5"])
    assert first.preference.counts == {"scored": 5, "kept": 6}, "written since, and found"
    assert len(list(cache.glob("*/*.json"))) == 2
    other = task_of(typed(tmp_path, save(tmp_path / "other", "roberta")))
    assert other.score(ITEMS, OUTPUTS) != rewards[:5]
    next((cache / str(first.preference_model.digest)).glob("*.json")).write_text("{")
    with pytest.raises(UserError, match=r"is damaged .*; remove it"):
        task_of(overrides).score(ITEMS[:1], ["w6"])


def test_another_model_under_the_path_is_another_run(tmp_path):
    folder = save(tmp_path / "model")
    overrides = typed(tmp_path, folder)
    config = quickly_composed(overrides)
    before, task = run_key(config), task_of(overrides)
    task.load_scorer()
    moved = quickly_composed([*overrides, "task.preference_model.map=rank"])
    assert run_key(moved) != before == run_key(quickly_composed(overrides))
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert run_key(quickly_composed(overrides)) != before
    with pytest.raises(UserError, match="files were changed since this run was frozen"):
        task_of(typed(tmp_path, folder, f"task.preference_model.digest={'0' * 16}")).load_scorer()
    with pytest.raises(UserError, match="files were changed"):
        task.score(ITEMS, OUTPUTS)
    fresh = task_of(overrides)
    assert fresh.preference.logits(ITEMS[:1], ["w3"]) == pytest.approx(
        [own_logit(folder, ITEMS[0].user, "w3", True)], abs=1e-5
    )


def test_a_model_that_is_not_asked_is_in_no_key(tmp_path):
    plain = ["task=jsonl", f"task.path={tmp_path}", "task.choices=[yes,no]"]
    described = [*plain, "task.preference_model.path=/none", "task.preference_model.map=rank"]
    assert run_key(quickly_composed(plain)) == run_key(quickly_composed(described))


def refused(task: JsonLines) -> str:
    with pytest.raises(UserError) as caught:
        task.score(ITEMS, OUTPUTS)
    return str(caught.value)


def test_what_is_no_such_model_is_named(tmp_path):
    several = task_of(typed(tmp_path, save(tmp_path / "several", labels=3)))
    assert "gives 3 logits for an answer" in refused(several)
    tiny.save_model("llama", tmp_path / "writes")
    writes = task_of(typed(tmp_path, tmp_path / "writes"))
    assert "its weights lack score.weight" in refused(writes)
    cut = save(tmp_path / "cut")
    (cut / "model.safetensors").unlink()
    assert "can't be loaded" in refused(task_of(typed(tmp_path, cut)))
    with pytest.raises(UserError, match="there is no such folder"):
        task_of(typed(tmp_path, tmp_path / "nowhere"))
    own = save(tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C",
               "AutoModelForSequenceClassification": "evil.M"}}  # fmt: skip
    (own / "config.json").write_text(json.dumps(config))
    (own / "evil.py").write_text("raise SystemExit('ran')")
    assert "Python code of its own" in refused(task_of(typed(tmp_path, own)))


def test_a_logit_that_is_no_number_ends_it_with_the_item(tmp_path, cache):
    folder = save(tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] *= math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = refused(task_of(typed(tmp_path, folder)))
    assert "gives nan for an answer" in said and "item id" in said
    assert not list(cache.rglob("*.json")), "it isn't kept"


def test_an_answer_that_is_too_long_is_refused_and_not_cut(tmp_path):
    task = task_of(typed(tmp_path, save(tmp_path / "short", "roberta", chat=False)))
    with pytest.raises(UserError, match=r"have 10\d tokens, and the model reads 65; item id0"):
        task.score(ITEMS[:1], ["w1 " * 100])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task.preference_model.path=null", "set it to a folder or a hub id"),
        ("task.preference_model.map=sigmod", "did you mean 'sigmoid'"),
        ("task.preference_model.batch_size=0", "must be at least 1"),
        ("task.shuffle_labels=true", "does nothing to what a preference model reads"),
        ("task.answer_kind=f1", "does nothing with task.scorer=preference_model"),
    ],
)
def test_values_that_do_nothing_or_cannot_be_are_refused(override, says, llama, tmp_path):
    with pytest.raises(UserError, match=says):
        task_of(typed(tmp_path, llama, override)).splits()


def test_a_run_ranks_among_its_training_answers_and_tells_so(tiny_files, llama, tmp_path):
    model = [one for one in tiny_files.overrides() if not one.startswith("task")]
    overrides = [*model, *typed(tmp_path, llama, "task.preference_model.map=rank"),
                 "method=corrsteer_s", f"output_dir={tmp_path / 'out'}"]  # fmt: skip
    result, path = run_small(overrides)
    told = result["notes"]["preference_model"]
    assert told["ranked_among"] == 24 and told["map"] == "rank" and told["scored"] > 0
    assert result["scorer"] == f"preference_model({llama.name}@{told['digest']}, rank)"
    assert 0 <= result["accuracy_baseline"] <= 1 and (path / "result.json").exists()
