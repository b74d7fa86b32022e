"""Files that users bring: other encodings, marks, holes, links; each is read, or named."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest

from crl_exp.config.compatibility import NO_JUDGE, NO_PREFERENCE_MODEL
from crl_exp.config.errors import UserError
from crl_exp.saes.config import SAEConfig
from crl_exp.saes.layer_sae import load_saes
from crl_exp.tasks.data.rows import Source
from crl_exp.tasks.jsonl import JsonLines
from crl_exp.tasks.own.judge import JudgeConfig
from crl_exp.tasks.own.preference_model import PreferenceModel
from tests.helpers import tiny
from tests.helpers.tiny_run import random_sae_weights, run_small, save_sae

ROWS = [{"question": f"Is {n} even?", "answer": "no" if n % 2 else "yes"} for n in range(9)]


def jsonl(path: Path, choices: tuple[str, ...] = ("yes", "no")) -> JsonLines:
    return JsonLines(
        name="jsonl", n_train=3, n_validation=3, n_test=3, split_seed=0, max_new_tokens=1,
        choices=list(choices), chat_template=True, shuffle_labels=False, path=str(path),
        template="{question}", length_normalised=False, choice_prefix="", train_seed=None,
        groups=None, answer_kind="choice", stop=[],
        scorer="answer", function=None, function_source=None, judge=JudgeConfig(**NO_JUDGE),
        preference_model=PreferenceModel(**NO_PREFERENCE_MODEL),
    )  # fmt: skip


def written(path: Path, rows: list, encoding: str = "utf-8", mark: bytes = b"") -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(mark + text.encode(encoding))
    return path


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        jsonl(path).splits()
    return str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    plain = jsonl(written(tmp_path / "plain.jsonl", ROWS)).splits()
    marked = jsonl(written(tmp_path / "marked.jsonl", ROWS, mark=codecs.BOM_UTF8)).splits()
    assert plain.digest() == marked.digest()


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json"])
def test_a_byte_order_mark_in_data_files(tmp_path, name):
    content = {
        "rows.csv": "question,answer\nq,a\n", "rows.jsonl": '{"question": "q", "answer": "a"}\n',
        "rows.json": '[{"question": "q", "answer": "a"}]',
    }[name]  # fmt: skip
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content.encode())
    source = Source("hub/id", None, None, str(tmp_path / name))
    (row,) = source.read("data_files", ["question", "answer"], [])
    assert row.cells == {"question": "q", "answer": "a"}


def test_the_same_question_with_two_answers_is_named_with_both_lines(tmp_path):
    rows = [*ROWS, {"question": "Is 2 even?", "answer": "no"}]
    said = refused(written(tmp_path / "conflict.jsonl", rows))
    assert "'yes' in line 3" in said and "'no' in line 10" in said and "Is 2 even?" in said


def test_the_same_question_with_the_same_answer_is_one_item(tmp_path):
    splits = jsonl(written(tmp_path / "twice.jsonl", [*ROWS, ROWS[0]])).splits()
    assert sum(len(items) for items in splits.named().values()) == len(ROWS)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("question", None, "the question is null"), ("question", ["a"], r'the question is ["a"]'),
        ("question", {"en": "a"}, "the question is {"), ("question", True, "the question is true"),
        ("question", " ", "the question is empty"), ("answer", None, "the answer is null"),
        ("answer", ["yes"], "the answer is ["), ("question", "a\ud800b", r"holds \ud800 alone"),
        ("answer", "\udc00", r"holds \udc00 alone"),
    ],
)  # fmt: skip
def test_what_is_no_question_is_named_with_its_line(tmp_path, key, value, says):
    lines = [json.dumps(row) for row in [*ROWS[:4], {**ROWS[4], key: value}, *ROWS[5:]]]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    said = refused(tmp_path / "bad.jsonl")
    assert "bad.jsonl, line 5" in said and says in said


def test_a_line_that_is_no_object_is_named(tmp_path):
    assert "line 2: expected" in refused(written(tmp_path / "list.jsonl", [ROWS[0], [1, 2]]))


def test_numbers_are_questions_too(tmp_path):
    rows = [{"question": n, "answer": "yes"} for n in range(9)]
    users = {i.user for i in jsonl(written(tmp_path / "n.jsonl", rows)).splits().train}
    assert users <= {str(n) for n in range(9)}


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_another_encoding_is_named_with_line_and_byte(tmp_path, mark):
    text = "".join(json.dumps(row) + "\n" for row in ROWS[:3])
    (tmp_path / "old.jsonl").write_bytes(mark + text.encode() + '{"question": "é"'.encode("cp1252"))
    said = refused(tmp_path / "old.jsonl")
    assert "old.jsonl, line 4, byte 15 of the line: 0xE9 is not UTF-8" in said
    assert "cp1252 ('é' there)" in said and "iconv -f cp1252" in said


def test_utf_16_is_named(tmp_path):
    assert "looks like utf-16" in refused(written(tmp_path / "wide.jsonl", ROWS, "utf-16"))


@pytest.mark.parametrize("name", ["old.csv", "old.jsonl"])
def test_another_encoding_in_data_files_is_named(tmp_path, name):
    first = "question,answer\n" if name.endswith("csv") else '{"question": "a", "answer": "b"}\n'
    (tmp_path / name).write_bytes(first.encode() + b"caf\xe9,b\n")
    with pytest.raises(UserError, match=rf"{name}, line 2, byte 4 of the line.*cp1252"):
        Source("hub/id", None, None, str(tmp_path / name)).read("data_files", ["question"], [])


def test_half_a_character_in_data_files_is_named(tmp_path):
    (tmp_path / "half.jsonl").write_text('{"question": "a"}\n{"question": "\\ud83d"}\n')
    source = Source("hub/id", None, None, str(tmp_path / "half.jsonl"))
    with pytest.raises(UserError, match=r"half.jsonl, line 2: holds \\ud83d alone"):
        source.read("data_files", ["question"], [])


def sae_config(folder: Path) -> SAEConfig:
    return SAEConfig("mine", str(folder), None, "blocks.{layer}.hook_resid_post", False, "sae")


def test_sae_folders_may_be_links(tmp_path):
    real = tmp_path / "elsewhere"
    for layer in (0, 1):
        save_sae(real, layer, random_sae_weights(seed=layer))
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "blocks.0.hook_resid_post").symlink_to(real / "blocks.0.hook_resid_post")
    (linked / "blocks.2.hook_resid_post").symlink_to(real / "blocks.1.hook_resid_post")
    (linked / "round").symlink_to(linked)  # a link to a folder above must not lead round for ever
    (real / "back").symlink_to(linked)
    (linked / "all").symlink_to(real)
    assert sae_config(linked).available == [0, 2]
    assert sae_config(linked / "all").available == [0, 1]


@pytest.mark.parametrize("kind", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_a_training_checkpoint_says_what_to_save(tmp_path, kind):
    import sae_lens

    more = {"matryoshka_widths": [8, 16]} if kind.startswith("M") else {}
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=8, d_sae=16, k=2, **more)
    getattr(sae_lens, f"{kind}TrainingSAE")(config).save_model(
        tmp_path / "blocks.0.hook_resid_post"
    )
    (said,) = sae_config(tmp_path).metadata_faults(0, 8, "tiny")
    assert "training checkpoint" in said and "save_inference_model" in said


@pytest.mark.slow
def test_pickled_weights_say_how_to_convert_them(tiny_files, tmp_path):
    """And the command that is said works."""
    import subprocess
    import sys

    import torch
    from safetensors.torch import load_file

    folder = tiny.save_model("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        run_small([*tiny_files.overrides(), f"model.path={folder}", f"output_dir={tmp_path}/out"])
    said = str(caught.value)
    assert "pytorch_model.bin only" in said and "convert it once" in said
    command = said.partition('python -c "')[2].rpartition('"')[0]
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
    assert torch.equal(
        load_file(folder / "model.safetensors")["lm_head.weight"], weights["lm_head.weight"]
    )


def sae_that_says(folder: Path, key: str, value: object) -> Path:
    """A whole one, but for this value in its config, or in what that says of the model."""
    path = save_sae(folder, 1, random_sae_weights(seed=0))
    held = json.loads((path / "cfg.json").read_text())
    within = held["metadata"] if key in ("hook_name", "model_from_pretrained_kwargs") else held
    within[key] = value
    (path / "cfg.json").write_text(json.dumps(held))
    return path


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("metadata", ["hook_name"], "its metadata is a list, not a config"),
        ("hook_name", 5, "hook_name=5 is a int"),
        ("d_in", str(tiny.D_MODEL), "d_in='32' is a str"),
        ("model_from_pretrained_kwargs", "none", "model_from_pretrained_kwargs='none' is a str"),
    ],
)
def test_a_value_of_another_type_in_an_saes_config_is_named_with_its_file(
    key, value, says, tmp_path
):
    path = sae_that_says(tmp_path, key, value)
    (said,) = sae_config(tmp_path).metadata_faults(1, tiny.D_MODEL, "tiny")
    assert str(path) in said and says in said


def test_what_saelens_does_not_mind_is_told_by_who_loads_the_weights_too(tmp_path):
    path = sae_that_says(tmp_path, "hook_name", 5)
    with pytest.raises(UserError, match="hook_name=5 is a int") as caught:
        load_saes(sae_config(tmp_path), [1], tiny.D_MODEL, "tiny", "cpu")
    assert str(path) in str(caught.value)
