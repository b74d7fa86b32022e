"""task=lm_eval: lm-eval's own accuracies item by item, the splits, and what can't be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from crl_exp.config.errors import UserError
from crl_exp.config.keys import run_key, settle
from crl_exp.config.sections import build
from crl_exp.experiments.fed import look_at, options_for
from crl_exp.experiments.run import run_experiment
from crl_exp.generation.config import EngineConfig
from crl_exp.generation.controller import Unsteered
from crl_exp.generation.engine import Engine
from crl_exp.generation.results import Job
from crl_exp.models.choice import ItemOptions
from crl_exp.runs.directory import RunDirectory
from crl_exp.tasks.base import Task
from crl_exp.tasks.harness import finding
from tests.helpers import tiny
from tests.helpers.lm_eval_tasks import MORE, SIZES, typed, write_data, write_yaml
from tests.helpers.tiny_run import quickly_composed, small

needs_lm_eval = pytest.mark.skipif(
    finding.missing() is not None, reason="lm-eval isn't installed: pip install -e '.[lm-eval]'"
)
METRICS = ("acc", "acc_norm", "acc_bytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A YAML file of each kind, and their data."""
    made = tmp_path_factory.mktemp("lm_eval")
    files = write_data(made)
    for kind in MORE:
        write_yaml(made, kind, files)
    return made


def settled(overrides: list[str]) -> DictConfig:
    config = quickly_composed(overrides)
    settle(config)
    return config


def task_of(overrides: list[str]) -> Task:
    return build(settled(overrides).task, "task", Task)


@pytest.fixture(scope="module")
def theirs(folder) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's own samples of each task, on a tiny random model."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 128
    given: dict[str, Any] = {"pretrained": tiny.model("llama"), "tokenizer": tokenizer}
    lm = HFLM(**given, device="cpu", batch_size=8)  # type: ignore[call-arg]
    found = evaluator.simple_evaluate(
        model=lm, tasks=[f"tiny_{kind}" for kind in MORE], log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )  # fmt: skip
    assert found is not None
    samples: Any = found.get("samples")
    return {kind: samples[f"tiny_{kind}"] for kind in MORE}


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.parametrize("kind", MORE)
def test_accuracies_are_those_of_lm_eval_item_by_item(kind, folder, theirs):
    lm = tiny.language_model("llama")
    engine, figures = Engine(lm, EngineConfig(batch_size=7, keep_gib=1.0, decode="eager")), {}
    for metric in METRICS:
        task = task_of(typed(folder / f"tiny_{kind}.yaml", f"task.metric={metric}"))
        splits = task.splits()
        options, items = options_for(task, lm, splits), splits.test
        own = options.of["test"] if isinstance(options, ItemOptions) else None
        read = engine.read([lm.prompt_ids(item.user, False) for item in items], options=own)
        jobs = [Job(Unsteered(), range(len(items)))]
        texts = engine.generate(read, jobs, 1, options)[0].texts
        scores = task.score(items, texts)
        assert all(score.valid for score in scores)
        figures[metric] = {i.user: s.reward for i, s in zip(items, scores, strict=True)}
    for metric in METRICS:
        asked = {one["arguments"][0][0].rstrip(): one[metric] for one in theirs[kind]}
        assert len(asked) == SIZES["test"]
        assert figures[metric] == asked, metric
    assert figures["acc"] != figures["acc_norm"], "the task tells the two apart"


@needs_lm_eval
def test_options_that_all_items_share_are_the_tasks_choices(folder):
    shared, own = (task_of(typed(folder / f"tiny_{kind}.yaml")) for kind in ("text", "own"))
    assert shared.choices == ["w1 w2", "w30"]
    assert shared.constrained_to == [" w1 w2", " w30"]
    assert {item.target for item in shared.splits().test} == {"w1 w2", "w30"}
    assert own.choices is None and own.options_by_item
    for item in own.splits().test:
        assert all(text.startswith(" w") for text in item.options)
        assert 0 <= int(str(item.target)) < len(item.options)


@needs_lm_eval
@pytest.mark.parametrize(
    ("leave_out", "sources"),
    [
        ((), ("train", "validation", "test")),
        (("validation_split",), ("train", "train", "test")),
        (("test_split",), ("train", "train", "validation")),
        (("training_split",), ("validation", "validation", "test")),
        (("training_split", "validation_split"), ("test", "test", "test")),
    ],
)
def test_parts_come_from_splits_that_never_touch_what_is_evaluated(leave_out, sources, tmp_path):
    files = write_data(tmp_path)
    path = write_yaml(tmp_path, "own", files, **dict.fromkeys(leave_out))
    sizes = [f"task.n_{part}=3" for part in ("train", "validation", "test")]
    splits = task_of(["task=lm_eval", f"task.lm_eval_task={path}", *sizes]).splits()
    users = {split: {json.loads(line)["question"] for line in Path(file).read_text().splitlines()}
             for split, file in files.items()}  # fmt: skip
    drawn = [{item.user for item in part} for part in (splits.train, splits.validation,
                                                       splits.test)]  # fmt: skip
    for part, split in zip(drawn, sources, strict=True):
        assert len(part) == 3 and part <= users[split]
    assert len(set.union(*drawn)) == 9
    one = any("drawn from it by task.split_seed" in said for said in splits.warnings)
    assert one == (len(set(sources)) == 1)


@needs_lm_eval
def test_what_an_example_or_test_asks_is_in_no_other_split(tmp_path):
    """A document of the training split that test has too, one that comes twice, and examples."""
    files = write_data(tmp_path)
    train, test = (Path(files[split]).read_text().splitlines() for split in ("train", "test"))
    Path(files["train"]).write_text("\n".join([*train, train[5], test[0]]) + "\n")
    path = write_yaml(tmp_path, "few", files, fewshot_config=None)
    task = task_of([*typed(path), "task.n_train=null", "task.n_validation=8"])
    splits = task.splits()
    shown = {json.loads(line)["question"] for line in train[:2]}
    asked = [item.user.rpartition(" w9 ")[2] for item in (*splits.train, *splits.test)]
    assert not shown & set(asked) and len(asked) == len(set(asked)) == 38 + 30
    assert all(all(one in item.user for one in shown) for item in splits.test)
    said = " ".join(splits.warnings)
    assert "2 documents of train are there twice, or in another split" in said
    assert "lm-eval draws other examples for each document" in said


@needs_lm_eval
def test_a_key_is_of_the_documents_and_a_run_refuses_others(tmp_path):
    files = write_data(tmp_path)
    path = write_yaml(tmp_path, "own", files)
    config = settled(typed(path))
    before, task = run_key(config), build(config.task, "task", Task)
    assert run_key(settled(typed(path))) == before
    lines = Path(files["test"]).read_text().splitlines()
    row = json.loads(lines[0])
    row["place"] = (row["place"] + 1) % len(row["options"])
    Path(files["test"]).write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    assert run_key(settled(typed(path))) != before
    with pytest.raises(UserError, match="its documents aren't those that this run was composed"):
        task.splits()
    reworded = write_yaml(tmp_path, "own", write_data(tmp_path), doc_to_text="w3 {{question}}")
    assert run_key(settled(typed(reworded))) != before


@needs_lm_eval
@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"output_type": "generate_until"}, "has output_type: generate_until"),
        ({"output_type": "loglikelihood"}, "has output_type: loglikelihood"),
        ({"doc_to_choice": None}, "has no doc_to_choice"),
        ({"doc_to_image": "picture"}, "shows images"),
        ({"doc_to_text": "{{right}}"}, "several contexts for one continuation"),
        ({"doc_to_target": "{{[0, 1]}}"}, "several right answers"),
        ({"group": "all_of_it", "task": ["a", "b"]}, "is a group of 2 tasks: a, b; name one"),
        ({"doc_to_target": "nothing"}, "no document with a right answer among its options"),
        ({"doc_to_text": ""}, "has no context"),
        ({"test_split": "tset"}, "tset"),
        ({"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": "/no.parquet"}}},
         "can't load its data set parquet"),
        ({"doc_to_choice": "{{options"}, "lm-eval can't make this task"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_used_is_refused_in_one_line(more, says, tmp_path):
    path = write_yaml(tmp_path, "own", write_data(tmp_path), **more)
    with pytest.raises(UserError, match=says) as refused:
        settled(typed(path))
    assert len(str(refused.value).splitlines()) == 1
    assert f"task.lm_eval_task={path}" in str(refused.value)


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("arc_eazy", "no task of this name; did you mean 'arc_easy'"),
        ("mmlu", "is a group of 4 tasks: mmlu_stem"),
        ("ai2_arc", "is a group of 2 tasks: arc_challenge, arc_easy; name one"),
        ("gsm8k", "has output_type: generate_until"),
        ("nowhere/mine.yaml", "there is no such file"),
    ],
)
def test_names_of_lm_eval_are_found_without_its_index(name, says):
    with pytest.raises(UserError, match=says):
        settled(["task=lm_eval", f"task.lm_eval_task={name}"])


@needs_lm_eval
def test_a_data_set_that_is_a_script_is_refused_and_files_do_in_its_place(tmp_path):
    script = tmp_path / "old_set"
    script.mkdir()
    (script / "old_set.py").write_text("import datasets\n")
    files = write_data(tmp_path)
    path = write_yaml(tmp_path, "own", files, dataset_path=str(script), dataset_kwargs=None)
    with pytest.raises(UserError, match="is a script, which datasets 4 and later don't run") as no:
        settled(typed(path))
    assert "task.data_files={" in str(no.value)
    instead = "{" + ",".join(f"{split}:{file}" for split, file in files.items()) + "}"
    task = task_of(typed(path, f"task.data_files={instead}"))
    assert len(task.splits().test) == SIZES["test"]


ROWS = {
    "arc_easy": lambda n: {
        "question": f"Which is {n}?", "answerKey": "ABCD"[n % 4], "id": str(n),
        "choices": {"text": [f"one {n}", "two", f"three of {n}", "four"], "label": [*"ABCD"]},
    },
    "boolq": lambda n: {"question": f"is it {n}", "passage": f"It is {n}.", "label": n % 2},
}  # fmt: skip


@needs_lm_eval
@pytest.mark.parametrize("name", ROWS)
def test_a_task_of_lm_evals_own_runs_on_files_in_the_place_of_its_data(name, tmp_path):
    files, at = {}, 0
    for split in ("train", "validation", "test"):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(ROWS[name](at + n)) + "\n" for n in range(40)))
        files[split], at = path, at + 40
    instead = "{" + ",".join(f"{split}:{path}" for split, path in files.items()) + "}"
    task = task_of(["task=lm_eval", f"task.lm_eval_task={name}", f"task.data_files={instead}",
                    "task.n_train=20", "task.n_validation=10"])  # fmt: skip
    splits = task.splits()
    assert len(splits.test) == 40, "all that lm-eval evaluates"
    if name == "boolq":
        assert task.constrained_to == [" no", " yes"]
        (one,) = [item for item in splits.test if "It is 41." in item.user]
        assert one.user == "It is 41.\nQuestion: is it 41?\nAnswer:" and one.target == "yes"
    else:
        (one,) = [item for item in splits.test if "Which is 81?" in item.user]
        assert one.user == "Question: Which is 81?\nAnswer:"
        assert (one.options, one.target) == ((" one 81", " two", " three of 81", " four"), "1")


def test_without_lm_eval_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setattr(finding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'crl_exp\[lm-eval\]'"):
        settled(["task=lm_eval", "task.lm_eval_task=arc_easy"])


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.parametrize(
    ("kind", "method"),
    [("own", "crl"), ("own", "attribution"), ("own", "lora"), ("own", "prompting"),
     ("own", "probe_steering"), ("own", "corrsteer_a"), ("text", "calibration"),
     ("index", "attribution")],
)  # fmt: skip
def test_a_run_steers_answers_that_are_one_of_each_items_options(
    kind, method, folder, tiny_files, tmp_path
):
    overrides = [
        *(one for one in tiny_files.overrides() if not one.startswith("task")),
        *typed(folder / f"tiny_{kind}.yaml", "task.n_test=16"), f"output_dir={tmp_path}",
        f"method={method}", "layers=list", "layers.layers=[0,2]",
    ]  # fmt: skip
    config = small(overrides)
    settle(config)
    result = run_experiment(config, False)
    assert result is not None and result["n"] == 16
    assert result["notes"]["lm_eval"]["task"] == f"tiny_{kind}"
    assert (RunDirectory(config).path / "items.parquet").is_file()


@needs_lm_eval
@pytest.mark.parametrize("kind", ["own", "text"])
def test_shuffled_labels_stay_among_each_items_options(kind, folder):
    path = folder / f"tiny_{kind}.yaml"
    plain, shuffled = (
        task_of(typed(path, f"task.shuffle_labels={on}")).splits() for on in ("false", "true")
    )
    assert shuffled.test == plain.test
    before, after = ([item.target for item in part.train] for part in (plain, shuffled))
    assert before != after and sorted(map(str, before)) == sorted(map(str, after))
    for item in shuffled.train if kind == "own" else ():
        assert int(str(item.target)) < len(item.options)


@needs_lm_eval
def test_options_that_join_the_prompts_last_word_are_told(folder, tmp_path):
    """The tiny tokenizer reads a word up to the next blank, whatever option it ends in."""
    lm = tiny.language_model("llama")
    apart = task_of(typed(folder / "tiny_text.yaml"))
    joined = task_of(typed(write_yaml(tmp_path, "text", write_data(tmp_path), target_delimiter="")))
    for task, warns in ((apart, False), (joined, True)):
        splits = task.splits()
        options = options_for(task, lm, splits)
        _, said = look_at(task, lm, options, splits.test[0].user)
        assert (said is not None and "differ from lm-eval's" in said) == warns


@needs_lm_eval
@pytest.mark.parametrize("method", ["probe", "bag_of_words", "calibration"])
def test_methods_that_need_options_of_all_items_refuse_others(method, folder):
    from crl_exp.experiments import config as configs

    config = settled([*typed(folder / "tiny_own.yaml"), f"method={method}", "sae=none"])
    with pytest.raises(UserError, match="has other options for each item"):
        configs.validate(configs.experiment(config))
