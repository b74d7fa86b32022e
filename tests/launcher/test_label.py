"""`label`: a judge behind a real server names a feature and is tested on held-out texts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from crl_exp.config.errors import UserError
from crl_exp.launcher.commands.label import main
from crl_exp.launcher.finished import load_run
from crl_exp.report.feature_labels import JUDGED, judged_label
from tests.helpers import tiny
from tests.helpers.tiny_run import random_sae_weights, run_small
from tests.tasks.test_own_judge import Endpoint, endpoint

__all__ = ["endpoint"]
LAYER = 1


@pytest.fixture(scope="module")
def run(tiny_files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    return run_small([*tiny_files.overrides(), "method=corrsteer_s", "task.n_validation=40",
                      "task.n_train=24", f"output_dir={out}"])[1]  # fmt: skip


@pytest.fixture(scope="module")
def act_of(tiny_files, run) -> dict[str, torch.Tensor]:
    """Largest activation of every feature by user turn [F], from transformers' own residuals."""
    model = AutoModelForCausalLM.from_pretrained(tiny_files.root / "models" / "llama").eval()
    weights = random_sae_weights(seed=LAYER)
    found = {}
    splits = load_run(run).task.splits()
    for item in [*splits.train, *splits.validation]:
        ids = tiny.tokenizer()(f"<user> {item.user} <bot>", return_tensors="pt").input_ids
        with torch.no_grad():
            x_TD = model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0, 1:]
        pre_TF = (x_TD - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        found[item.user] = (pre_TF * (pre_TF > weights["threshold"])).max(dim=0).values
    return found


@pytest.fixture(scope="module")
def feature(act_of, run) -> int:
    """One that is silent on ten validation texts or more, and active on as many."""
    held = [item.user for item in load_run(run).task.splits().validation]
    silent_F = torch.stack([act_of[text] <= 0 for text in held]).sum(dim=0)
    return int((silent_F - len(held) / 2).abs().argmin())


def labelled(run: Path, at: Endpoint, feature: int, *more: str) -> int:
    asked = [str(run), "--feature", f"{LAYER}/{feature}", "--base-url", at.url, "--model", "m"]
    small = ["--tries", "2", "--wait", "0", "--held-out", "12", "--texts", "4"]
    return main([*asked, *small, *more])


def text_of(prompt: str) -> str | None:
    """The text that a detection prompt asks about; None for one that asks for a label."""
    found = re.search(r"\nText: (.*)\n", prompt)
    return found and found[1]


def test_a_judge_that_knows_scores_1_and_one_that_agrees_to_all_chance(
    run, endpoint, act_of, feature, capsys
):
    def knows(n: int, prompt: str):
        text = text_of(prompt)
        if text is None:
            return 200, ' "words of\n a kind" ', {}
        assert "Description: words of a kind\n" in prompt
        return 200, "Yes." if act_of[text][feature] > 0 else "no", {}

    endpoint.behave = knows
    assert labelled(run, endpoint, feature) == 0
    splits = load_run(run).task.splits()
    asked = [text for prompt in endpoint.prompts if (text := text_of(prompt))]
    held, train = ({i.user for i in part} for part in (splits.validation, splits.train))
    assert len(asked) == len(set(asked)) == 12 and set(asked) <= held
    assert sum(bool(act_of[text][feature] > 0) for text in asked) == 6
    (shown,) = [prompt for prompt in endpoint.prompts if text_of(prompt) is None]
    strongest = sorted(train, key=lambda text: -act_of[text][feature])[:4]
    assert re.findall(r"\d\. (.*)\n", shown) == strongest
    kept = json.loads((run / JUDGED).read_text())[f"{LAYER}/{feature}"]
    assert kept["label"] == "words of a kind" and kept["balanced_accuracy"] == 1 and kept["n"] == 12
    assert 0.7 < kept["interval"][0] < kept["interval"][1] == 1
    assert "balanced accuracy 1.00 [0.76, 1.00] on 12 held-out texts" in capsys.readouterr().out
    assert labelled(run, endpoint, feature) == 0 and len(endpoint.prompts) == 13, "paid for once"
    endpoint.behave = lambda n, prompt: (200, "yes" if text_of(prompt) else "anything", {})
    assert labelled(run, endpoint, feature, "--model", "agrees") == 0
    told = judged_label([run], LAYER, feature)
    assert told == "anything (by agrees; detection 0.50 [0.25, 0.75], n 12, chance .5)"


@pytest.mark.parametrize("nonsense", ["label", "verdict"])
def test_nonsense_and_absence_leave_no_label(nonsense, run, endpoint, feature, capsys):
    (run / JUDGED).unlink(missing_ok=True)
    good = {"label": (200, "x" * 300, {}), "verdict": (200, "fine words", {})}[nonsense]
    endpoint.behave = lambda n, prompt: good if text_of(prompt) is None else (200, "perhaps", {})
    assert labelled(run, endpoint, feature) == 1
    said = capsys.readouterr().out
    assert "no label (--base-url=" in said and "no reply that can be read in 2 tries" in said
    assert "Take another --model" in said and not (run / JUDGED).exists()
    endpoint.behave = lambda n, prompt: (503, "down", {})
    assert labelled(run, endpoint, feature) == 1 and not (run / JUDGED).exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--feature", "x"], "must be LAYER/INDEX"),
        (["--feature", "2/1"], "the run's layers are 1"),
        (["--feature", "1/99"], "has features 0 to 63"),
        (["--base-url", "nowhere"], "as in --base-url=http"),
        (["--api-key-from", "NO_SUCH_KEY"], "--api-key-from=NO_SUCH_KEY: there is no such"),
    ],
)
def test_what_cannot_be_asked_for_is_named(more, says, run, endpoint, feature):
    endpoint.behave = lambda n, prompt: (200, "yes", {})
    with pytest.raises(UserError, match=says):
        labelled(run, endpoint, feature, *more)
