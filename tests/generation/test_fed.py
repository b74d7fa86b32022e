"""What the model is really fed: the tokens, and that nothing kept of others passes for theirs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from crl_exp.config import kept as in_this_process
from crl_exp.config.compatibility import fill_missing, hashed
from crl_exp.config.errors import UserError
from crl_exp.config.keys import run_key
from crl_exp.experiments.fed import note_data
from crl_exp.generation.model_check import (
    check_log_probs,
    checked,
    error_beside_a_long_row,
    largest_error,
)
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.prompt_text import chat_ids, plain_ids
from tests.helpers import tiny
from tests.helpers.tiny_run import lab_of, quickly_composed, run_small

DATED = (
    "{% for m in messages %}<user> {{ date_string }} {{ m['content'] }} {% endfor %}"
    "{% if enable_thinking %}w1 {% endif %}<bot>"
)


def test_a_mark_that_a_tokenizer_appends_is_not_steered() -> None:
    from tokenizers.processors import TemplateProcessing

    made = tiny.tokenizer()
    made._tokenizer.post_processor = TemplateProcessing(
        single="<user> $A <eos>", special_tokens=[("<user>", 2), ("<eos>", 1)]
    )
    assert made("w1 w2")["input_ids"] == [2, 7, 8, 1]
    assert plain_ids(made, "w1 w2") == [2, 7, 8]
    assert plain_ids(made, "w1 <eos>") == [2, 7, 1], "one that the text itself has stays"
    assert plain_ids(tiny.tokenizer(), "w1 w2") == [7, 8]


def test_arguments_of_the_chat_template() -> None:
    made = tiny.tokenizer()
    made.chat_template = DATED
    plain = chat_ids(made, "w5", {"date_string": "w9"}, "tiny")
    thinking = chat_ids(made, "w5", {"date_string": "w9", "enable_thinking": True}, "tiny")
    assert made.convert_ids_to_tokens(plain) == ["<user>", "w9", "w5", "<bot>"]
    assert made.convert_ids_to_tokens(thinking) == ["<user>", "w9", "w5", "w1", "<bot>"]
    with pytest.raises(UserError, match="takes no such argument; did you mean 'enable_thinking'"):
        chat_ids(made, "w5", {"enable_thinkin": True}, "tiny")


def test_arguments_of_the_chat_template_are_in_the_config(tiny_files, tmp_path) -> None:
    """None: the key that runs had before there were any. A frozen config without them runs on."""
    common = [*tiny_files.overrides(), f"output_dir={tmp_path}"]
    plain = quickly_composed(common)
    given = quickly_composed([*common, "+model.chat_template_args.date_string=w9"])
    assert run_key(plain) != run_key(given)
    from omegaconf import OmegaConf

    held = OmegaConf.to_container(plain, resolve=True)
    assert isinstance(held, dict)
    assert "chat_template_args" not in hashed(held)["model"]
    del plain.model.chat_template_args
    fill_missing(plain)
    assert plain.model.chat_template_args == {}


@pytest.mark.parametrize(
    ("overrides", "mended"),
    [
        (["task.choices=[yes,no]"], []),
        (["task.choices=[A,B,C]"], []),
        (["task.choices=[entailment,contradiction]"], ["options_of_several_tokens"]),
        (["task=sentiment"], []),
        (["task=sentiment", "task.choices=null"], []),
        (["task=sentiment", "model.path=openai-community/gpt2"], ["options_of_several_tokens"]),
        (["task=refusal"], ["refusal_rule_v2"]),
        (["task=refusal", "task.scorer=classifier"], []),
        (["task=mmlu"], []),
    ],
)
def test_runs_that_were_wrong_have_other_keys(tiny_files, overrides, mended) -> None:
    from omegaconf import OmegaConf

    task = [] if any(o.startswith("task=") for o in overrides) else ["task=jsonl", "task.path=x"]
    plain = OmegaConf.to_container(quickly_composed([*task, *overrides]), resolve=True)
    assert isinstance(plain, dict)
    assert hashed(plain).get("mended", []) == mended


def edit_template(folder: Path, template: str) -> None:
    """As another process finds it."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        path = folder / name
        if name.endswith("jinja") and path.exists():
            path.write_text(template)
        elif path.exists() and "chat_template" in (held := json.loads(path.read_text())):
            path.write_text(json.dumps({**held, "chat_template": template}))
    in_this_process.LOADED.clear()


@pytest.fixture
def own_model(tiny_files, tmp_path) -> tuple[Path, list[str]]:
    folder = tmp_path / "model"
    shutil.copytree(tiny_files.root / "models" / "llama", folder)
    return folder, [*tiny_files.overrides(), f"model.path={folder}", "method=corrsteer_s"]


def found(path: Path) -> list[tuple[int, float]]:
    (layer,) = json.loads((path / "features.json").read_text()).values()
    return [(row["feature"], row["correlation"]) for row in layer["found"]]


def test_an_edited_chat_template_has_statistics_of_its_own(own_model, tmp_path) -> None:
    folder, common = own_model
    here = [*common, f"output_dir={tmp_path / 'out'}"]
    first, first_path = run_small(here)
    before = found(first_path)
    edit_template(folder, "w7 w8 w9 " + tiny.CHAT)
    second, path = run_small([*here, "sweep_name=again"])
    there = found(path)
    fresh = found(run_small([*common, f"output_dir={tmp_path / 'fresh'}"])[1])
    assert there == fresh != before
    # The config and its key are the same, so the result has to say it.
    assert first["run_key"] == second["run_key"] and first["weights"] == second["weights"]
    assert all(first["fed"][split] != second["fed"][split] for split in ("train", "test"))


def test_answers_of_a_process_are_of_the_tokens_fed(own_model, tmp_path) -> None:
    """A model that was displaced by another comes back with an edited template."""
    folder, common = own_model
    in_this_process.LOADED.clear()
    workspace = lab_of([*common, f"output_dir={tmp_path / 'a'}"])
    before = workspace.baseline("test").generation.tokens, workspace.depends_on("test")
    kept = in_this_process.LOADED["baseline"]
    edit_template(folder, "w7 w8 w9 " + tiny.CHAT)
    in_this_process.LOADED["baseline"] = kept
    again = lab_of([*common, f"output_dir={tmp_path / 'b'}"])
    assert again.depends_on("test") != before[1]
    again.baseline("test")
    assert len(in_this_process.LOADED["baseline"]) == 2


def test_a_run_that_has_begun_is_not_gone_on_with_other_tokens(own_model, tmp_path) -> None:
    folder, common = own_model
    common = [*common, f"output_dir={tmp_path / 'out'}"]
    workspace = lab_of(common)
    note_data(workspace.run, workspace.splits, workspace.lm, workspace.fed)
    edit_template(folder, "w7 w8 w9 " + tiny.CHAT)
    workspace = lab_of(common)
    note_data(
        workspace.run, workspace.splits, workspace.lm, workspace.fed
    )  # nothing was done yet: it begins now
    (workspace.run.path / "answers").mkdir()
    note_data(
        workspace.run, workspace.splits, workspace.lm, workspace.fed
    )  # the same tokens: it goes on
    edit_template(folder, "w5 " + tiny.CHAT)
    workspace = lab_of(common)
    with pytest.raises(
        UserError, match=r"prompts of train, validation, test are other tokens.*resu"
    ):
        note_data(workspace.run, workspace.splits, workspace.lm, workspace.fed)
    held = json.loads((workspace.run.path / "data.json").read_text())
    (workspace.run.path / "data.json").write_text(json.dumps({**held, "weights": "others"}))
    with pytest.raises(UserError, match="has other weights than when this run began"):
        note_data(workspace.run, workspace.splits, workspace.lm, workspace.fed)


# --- long prompts ---


def longrope() -> LanguageModel:
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    rotation = {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 6.0, 8.0],
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = Phi3Config(
        vocab_size=len(tiny.WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        original_max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.2, rope_scaling=rotation,
    )  # fmt: skip
    return LanguageModel(Phi3ForCausalLM(config), tiny.tokenizer(), "tiny-phi3")


def test_longrope_takes_what_it_turns_alike() -> None:
    """Beyond that one long prompt would change the short ones of its batch."""
    from crl_exp.generation.engine import Engine, EngineConfig

    lm = checked(longrope())
    engine = Engine(lm, EngineConfig(4, 1.0, "eager"))
    with pytest.raises(
        UserError, match=r"a prompt has 70 tokens, but tiny-phi3 takes 64 .*LongRoPE"
    ):
        engine.read([[5] * 70, [6, 7]])
    lm.max_positions = 512  # as its config says
    assert error_beside_a_long_row(lm) > 0.01
    with pytest.raises(UserError, match="differ by"):
        checked(lm)


def test_the_check_at_loading_reads_past_a_window(monkeypatch) -> None:
    """A mask that forgets the window is right for short prompts only."""
    lm = tiny.language_model("gemma2")
    assert largest_error(lm) < 1e-5
    lm.window = 40  # the model's own is 6
    assert largest_error(lm) > 1e-3


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_log_probabilities_are_the_models_own(kind: str) -> None:
    lm = tiny.language_model(kind)
    check_log_probs(lm)
    if kind == "gemma2":
        lm.final_cap = None
        with pytest.raises(UserError, match="options of several tokens can't be compared"):
            check_log_probs(lm)
