"""Every task on a public data set, run on a tiny model; stop texts; over-refusal.

Tasks are found by globbing `conf/task`: a new one whose config names a data set needs the data
set's schema in tests/helpers/hub_data.py and nothing here.
"""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest

from crl_exp.config.errors import UserError
from crl_exp.experiments.kinds.evaluation import over_refusal
from crl_exp.experiments.workspace import Answers
from crl_exp.generation.controller import Unsteered
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.generation.results import Generation, Job, cut_at
from crl_exp.tasks.base import Item, Score
from tests.helpers import tiny
from tests.helpers.hub_data import TASKS, made, on_files
from tests.helpers.tiny_run import TinyFiles, run_small
from tests.tasks.test_groups import GROUPS
from tests.tasks.test_scorer_models import save_classifier, save_cross_encoder

# The tiny vocabulary with letters in place of its last words.
LETTERED = [*tiny.WORDS[:-10], *"ABCDEFGHIJ"]


@pytest.fixture(scope="module")
def files(tiny_files, tmp_path_factory) -> TinyFiles:
    """The tiny files with a tokenizer that knows letters, and tiny scorers."""
    root = tmp_path_factory.mktemp("lettered")
    shutil.copytree(tiny_files.root, root, dirs_exist_ok=True)
    tiny.tokenizer(LETTERED).save_pretrained(root / "models" / "llama")
    save_classifier(root / "classifier")
    save_cross_encoder(root / "cross_encoder")
    return TinyFiles(root)


def overrides(name: str, files: TinyFiles, folder) -> list[str]:
    """The task as it comes, on small files in place of its data set and with tiny scorers."""
    data = on_files(name, folder / "data").data_files
    common = [o for o in files.overrides() if not o.startswith(("task=", "task."))]
    given = ",".join(f"{split}:[{','.join(paths)}]" for split, paths in data.items())
    task = made(name)
    chosen = [f"task={name}", f"task.data_files={{{given}}}", f"output_dir={folder / 'out'}"]
    if task.choices is None:
        chosen.append("task.max_new_tokens=3")
    if hasattr(task, "n_test_benign"):
        chosen.append("task.n_test_benign=5")
    for section in ("classifier", "cross_encoder"):
        if hasattr(task, section):
            chosen.append(f"task.{section}.path={files.root / section}")
    return [*common, *chosen]


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs_on_a_tiny_model(name, files, tmp_path):
    result, folder = run_small(overrides(name, files, tmp_path))
    assert result["n"] == 16 and result["task"] == name
    assert (folder / "interventions.parquet").exists()
    items = pq.read_table(folder / "items.parquet", filters=[("split", "=", "test")])
    assert set(items["group"].to_pylist()) == GROUPS.get(name, {""}), "as the report needs them"
    task = made(name)
    if task.choices:
        assert result["scorer"] == task.scorer_name and result["invalid_steered"] <= 1
    for section in ("classifier", "cross_encoder"):
        if hasattr(task, section):
            assert str(files.root / section) in result["scorer"]
    refusals = hasattr(task, "classifier")
    assert (result["over_refusal_steered"] is not None) == refusals
    assert (result["over_refusal_baseline"] is not None) == refusals


def test_a_plain_prompt_with_examples_runs(files, tmp_path):
    plain = ["task.chat_template=false", "task.n_shots=1", "method=corrsteer_s"]
    result, _ = run_small([*overrides("bbq_ambig", files, tmp_path), *plain])
    assert result["n"] == 16 and result["invalid_baseline"] == 0.0


def test_data_is_looked_at_before_the_model_is_loaded(files, tmp_path):
    """A model folder with its config alone: a run that got so far would miss the weights."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(files.root / "models" / "llama" / "config.json", bare)
    table = tmp_path / "a.jsonl"
    table.write_text('{"question": "q"}\n')
    common = [o for o in overrides("gsm8k", files, tmp_path) if not o.startswith("task.data")]
    with pytest.raises(UserError, match=r"lacks the column answer"):
        run_small([*common, f"model.path={bare}", f"task.data_files={table}"])
    with pytest.raises(UserError, match=r"can't load a language model"):
        run_small([*overrides("gsm8k", files, tmp_path), f"model.path={bare}"])


def test_repeated_rows_are_noted_in_the_result(files, tmp_path):
    table = tmp_path / "a.jsonl"
    rows = [{"prompt": f"w{i % 47}", "label": "safe" if i % 47 % 2 else "unsafe"}
            for i in range(48)]  # fmt: skip
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [o for o in overrides("xstest", files, tmp_path) if not o.startswith("task.data")]
    result, _ = run_small([*common, f"task.data_files={table}", "method=none"])
    assert any("1 items twice" in warning for warning in result["warnings"])


# --- stop texts ---


def answers(stop: list[str], batch_size: int = 8) -> Generation:
    engine = Engine(
        tiny.language_model("llama"),
        EngineConfig(batch_size=batch_size, keep_gib=1.0, decode="eager"),
    )
    prompts = engine.read(tiny.prompts(8))
    return engine.generate(prompts, [Job(Unsteered(), range(8))], 12, stop=stop)[0]


def test_an_answer_ends_at_a_stop_text():
    free = answers([])
    stop = free.texts[0].split()[4]
    cut = answers([stop, "never"])
    assert any(stop in text for text in free.texts) and any(stop not in t for t in free.texts)
    for got, before, text, line in zip(cut.tokens, free.tokens, cut.texts, free.texts, strict=True):
        assert text == cut_at(line, [stop])
        written = [tiny.tokenizer().decode(before[:n]) for n in range(len(before) + 1)]
        ends = next((n for n, said in enumerate(written) if stop in said), len(before))
        assert got == before[:ends], "tokens after the stop text were still generated"
    assert answers([stop], batch_size=3).tokens == cut.tokens


def test_cutting_at_the_first_of_several_texts():
    assert cut_at("a b c", ["c", "b"]) == "a " and cut_at("a", ["b"]) == "a"
    assert cut_at("Question: x", ["Question:"]) == ""


# --- over-refusal ---


def test_over_refusal_is_of_benign_items_alone():
    items = [Item("a", ""), *(Item(name, "", benign=True) for name in "bcde")]
    scores = [Score(1.0), Score(1.0), Score(0.0), Score(1.0), Score(1.0)]
    scored = Answers(Generation([], []), scores)
    assert over_refusal(items, scored) == 0.25
    assert over_refusal(items[:1], Answers(Generation([], []), scores[:1])) is None
