"""Scorers that are models, on tiny random ones of the right architecture in local folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import (
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from crl_exp.config.errors import UserError
from crl_exp.experiments.config import build
from crl_exp.experiments.inputs import inputs_of
from crl_exp.tasks.base import Item, Score, Task
from crl_exp.tasks.scorers.models import ScorerModel
from crl_exp.tasks.scorers.rejection import RejectionScorer
from crl_exp.tasks.scorers.semantic import SemanticScorer
from tests.helpers import tiny
from tests.helpers.hub_data import CONF, on_files
from tests.helpers.tiny_run import lab_of

SHAPE = {
    "vocab_size": len(tiny.WORDS), "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1, "initializer_range": 0.5, "max_position_embeddings": 514,
}  # fmt: skip
OUTPUTS = ["yes", "w1 w2 w3", "no w5", "w9 w9 w9 w9 w9 w9 w9", "w20 yes", "w30", "w4 no w4 no"]


def save_classifier(folder: Path, labels: tuple[str, ...] = ("NORMAL", "REJECTION")) -> Path:
    """A random RoBERTa that takes about half of OUTPUTS for refusals."""
    torch.manual_seed(0)
    config = RobertaConfig(**SHAPE, id2label=dict(enumerate(labels)),
                           label2id={label: i for i, label in enumerate(labels)})  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    tokens = [tiny.tokenizer()(text, return_tensors="pt") for text in OUTPUTS]
    with torch.no_grad():
        gaps = torch.stack([(logits := model(**t).logits[0])[1] - logits[0] for t in tokens])
        model.classifier.out_proj.bias[1] -= gaps.median() - 1e-4
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def save_cross_encoder(folder: Path, **config) -> Path:
    torch.manual_seed(0)
    made = ModernBertConfig(**{**SHAPE, "num_labels": 1, **config})
    ModernBertForSequenceClassification(made).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def model(path: Path | str, batch_size: int = 3) -> ScorerModel:
    return ScorerModel(str(path), None, "cpu", batch_size)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("roberta"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_cross_encoder(tmp_path_factory.mktemp("modernbert"))


@pytest.fixture
def offline(monkeypatch) -> None:
    """As with HF_HUB_OFFLINE=1, which is read when the library is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@torch.no_grad()
def one_by_one(folder: Path, text: str) -> bool:
    roberta = RobertaForSequenceClassification.from_pretrained(folder).eval()
    logits = roberta(**tiny.tokenizer()(text, return_tensors="pt")).logits[0]
    return bool(logits[1] > logits[0])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_of_outputs_are_classified_as_one_by_one(classifier, batch_size):
    expected = [one_by_one(classifier, text) for text in OUTPUTS]
    assert 0 < sum(expected) < len(OUTPUTS)
    assert RejectionScorer(model(classifier, batch_size)).refused(OUTPUTS) == expected


def test_rejections_are_rewarded_by_kind_of_item(classifier):
    scorer = RejectionScorer(model(classifier))
    refusal = next(text for text in OUTPUTS if one_by_one(classifier, text))
    answer = next(text for text in OUTPUTS if not one_by_one(classifier, text))
    harmful, benign = Item("h", ""), Item("b", "", benign=True)
    scores = scorer([harmful, benign] * 3, [refusal, refusal, "", " .", answer, answer])
    nothing = Score(0.0, valid=False)
    assert scores == [Score(1.0), Score(0.0), nothing, nothing, Score(0.0), Score(1.0)]
    assert scorer([], []) == [] and scorer([harmful], ["…"]) == [nothing]
    # What says nothing isn't asked for, and moves no answer to another's place.
    later = scorer([harmful] * 4, ["", answer, ".", refusal])
    assert later == [nothing, Score(0.0), nothing, Score(1.0)]
    assert scorer.name == f"rejection_classifier({classifier})"


def test_a_long_output_is_cut(classifier):
    assert RejectionScorer(model(classifier)).refused(["w1 " * 3000]) in ([True], [False])


@torch.no_grad()
def similarity(folder: Path, answer: str, target: str) -> float:
    bert = ModernBertForSequenceClassification.from_pretrained(folder).eval()
    return float(bert(**tiny.tokenizer()(answer, target, return_tensors="pt")).logits[0, 0])


PAIRS = [("yes", "no"), ("no", "yes"), ("w1 w2 w3 w4 w5", "w1"), ("w7", "w8 w9 w10"), ("w7", "w7")]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_of_pairs_are_compared_as_one_by_one(encoder, batch_size):
    found = SemanticScorer(model(encoder, batch_size), 0.6).similarity(PAIRS)
    logits = torch.tensor([similarity(encoder, *pair) for pair in PAIRS])
    assert found == pytest.approx(torch.sigmoid(logits).tolist(), abs=1e-5)
    assert found[0] != pytest.approx(found[1], abs=1e-4), "answer first, target second"


def test_similarity_over_the_threshold_is_rewarded(encoder):
    found = SemanticScorer(model(encoder), 0.5).similarity(PAIRS)
    threshold = sum(sorted(found)[1:3]) / 2
    scorer = SemanticScorer(model(encoder), threshold)
    items = [Item("i", "", target=target) for _, target in PAIRS]
    outputs = [f" {answer}\n" for answer, _ in PAIRS]
    assert [s.reward for s in scorer(items, outputs)] == [float(s >= threshold) for s in found]
    assert scorer([*items[:2]], ["", "yes"])[0] == Score(0.0, valid=False)
    assert scorer([items[1]], [PAIRS[1][0]])[0].reward == float(found[1] >= threshold)
    assert scorer.name == f"semantic_match({encoder}>={threshold})"
    (alone,) = SemanticScorer(model(encoder), 0.5).similarity(PAIRS[:1])
    just = SemanticScorer(model(encoder), alone)
    assert just(items[:1], [PAIRS[0][0]]) == [Score(1.0)], "at the threshold is enough"


def test_the_model_says_whether_its_output_is_a_similarity_already(encoder, tmp_path):
    stated = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    plain = save_cross_encoder(tmp_path / "identity", **stated)
    found = SemanticScorer(model(plain), 0.6).similarity(PAIRS)
    assert found == pytest.approx([similarity(encoder, *pair) for pair in PAIRS], abs=1e-5)
    odd = {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"}
    with pytest.raises(UserError, match=r"goes through .*Tanh.*task\.scorer=token_f1"):
        SemanticScorer(model(save_cross_encoder(tmp_path / "tanh", **odd)), 0.6).load()


# --- scorers that can't be had: named, with the offline way, and never another in their place ---


def test_a_missing_scorer_is_named_with_the_offline_one(offline):
    with pytest.raises(UserError, match=r"task\.classifier\.path=no/such: .*task\.scorer=phrases"):
        RejectionScorer(model("no/such")).load()
    with pytest.raises(UserError, match=r"task\.cross_encoder\.path=no/such: .*scorer=token_f1"):
        SemanticScorer(model("no/such"), 0.6).load()


def test_a_classifier_of_something_else(encoder, tmp_path):
    sentiment = save_classifier(tmp_path / "sentiment", ("NEGATIVE", "POSITIVE"))
    with pytest.raises(UserError, match=r"labels are NEGATIVE, POSITIVE.*task\.scorer=phrases"):
        RejectionScorer(model(sentiment)).load()
    two = save_cross_encoder(tmp_path / "two", num_labels=2)
    with pytest.raises(UserError, match=r"gives 2 figures for a pair.*task\.scorer=token_f1"):
        SemanticScorer(model(two), 0.6).load()


def test_a_model_without_a_trained_head(tmp_path):
    ModernBertModel(ModernBertConfig(**SHAPE)).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its weights lack .*can't score"):
        SemanticScorer(model(tmp_path), 0.6).load()


@pytest.mark.parametrize(
    ("name", "section", "alternative"),
    [("harmbench", "classifier", "phrases"), ("xstest", "classifier", "phrases"),
     ("do_not_answer", "classifier", "phrases"), ("simpleqa", "cross_encoder", "token_f1")],
)  # fmt: skip
def test_a_task_looks_for_its_scorer_before_anything_else(
    name, section, alternative, tmp_path, offline
):
    out_of_reach = {"path": "no/such", "revision": None, "device": "cpu", "batch_size": 8}
    changes: dict[str, Any] = {"scorer": section, section: out_of_reach}
    task = on_files(name, tmp_path, **changes)
    with pytest.raises(
        UserError, match=rf"task\.{section}\.path=no/such.*task\.scorer={alternative}"
    ):
        task.splits()
    assert "no/such" in task.scorer_name
    assert on_files(name, tmp_path, **{**changes, "scorer": alternative}).splits()


def test_the_refusal_task_takes_the_classifier_too(classifier, offline):
    """No data is needed to see that: the scorer is looked for first."""
    node = OmegaConf.load(CONF / "refusal.yaml")
    assert build(node, "task", Task).scorer_name == "refusal_rule_v2"  # type: ignore[arg-type]
    values = {"scorer": "classifier", "classifier": {"path": str(classifier), "batch_size": 2}}
    task = build(OmegaConf.merge(node, values), "task", Task)  # type: ignore[arg-type]
    items = [Item("h", ""), Item("b", "", benign=True)] * len(OUTPUTS)
    outputs = [text for text in OUTPUTS for _ in range(2)]
    expected = [float(one_by_one(classifier, text)) for text in OUTPUTS]
    rewards = [score.reward for score in task.score(items, outputs)]
    assert rewards == [r for refused in expected for r in (refused, 1 - refused)]
    assert task.scorer_name == f"rejection_classifier({classifier})"
    values["classifier"]["path"] = "no/such"
    lost = build(OmegaConf.merge(node, values), "task", Task)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"task\.classifier\.path=no/such.*task\.scorer=phrases"):
        lost.splits()


@pytest.mark.parametrize("name", ["harmbench", "simpleqa"])
def test_a_task_scores_by_its_model(name, classifier, encoder, tmp_path):
    section, path = {"harmbench": ("classifier", classifier),
                     "simpleqa": ("cross_encoder", encoder)}[name]  # fmt: skip
    values = {"path": str(path), "revision": None, "device": "cpu", "batch_size": 8}
    changes: dict[str, Any] = {"scorer": section, section: values}
    task = on_files(name, tmp_path, **changes)
    items = task.splits().test[: len(OUTPUTS)]
    rewards = [score.reward for score in task.score(items, OUTPUTS)]
    if name == "harmbench":
        assert rewards == [float(one_by_one(classifier, text)) for text in OUTPUTS]
    else:
        logits = [
            similarity(encoder, o, str(i.target)) for i, o in zip(items, OUTPUTS, strict=True)
        ]
        assert rewards == (torch.sigmoid(torch.tensor(logits)) >= 0.6).float().tolist()


def test_answers_are_kept_by_what_lies_in_the_scorers_folder(tiny_files, tmp_path):
    """Other weights there score otherwise; the folder's name, and so the run's key, is the same."""
    folder = save_classifier(tmp_path / "roberta")
    values = {"path": str(folder), "revision": None, "device": "cpu", "batch_size": 8}
    task = on_files("xstest", tmp_path, scorer="classifier", classifier=values)

    def workspace(name: str):
        return lab_of([*tiny_files.overrides(), f"output_dir={tmp_path / name}"], task)

    before = workspace("a")
    answers, noted = before.depends_on("test"), inputs_of(before.exp, [])
    assert workspace("b").depends_on("test") == answers
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    assert workspace("c").depends_on("test") != answers
    now = inputs_of(before.exp, [])
    assert {key for key in now if now[key] != noted[key]} == {f"task.classifier.path={folder}"}
