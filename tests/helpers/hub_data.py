"""Small files in the true schemas of the public data sets that tasks are drawn from.

Columns, types and splits are those of the data sets' pages; the contents are made up. A task on a
data set that isn't here yet needs its schema in `SCHEMAS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, List, Value
from omegaconf import OmegaConf

from crl_exp.experiments.config import build
from crl_exp.tasks.base import Task
from crl_exp.tasks.hub import HubTask

CONF = Path(__file__).parents[2] / "conf" / "task"
TEXT, INT = Value("string"), Value("int64")
Schema = tuple[Features, Callable[[int], dict[str, Any]]]


def texts(*names: str) -> dict[str, Value]:
    return dict.fromkeys(names, TEXT)


def mmlu(i: int) -> dict[str, Any]:
    return {
        "question": f"What is w{i} ?", "subject": "anatomy" if i % 2 else "high_school_physics",
        "choices": [f"w{i}", "w1 , w2", 'a "w3"', "None"], "answer": i % 4,
    }  # fmt: skip


def mmlu_pro(i: int) -> dict[str, Any]:
    options = [f"w{i} {k}" for k in range(3 + i % 8)]
    right = i % len(options)
    return {
        "question_id": i, "question": f"Which is w{i} ?", "options": options,
        "answer": "ABCDEFGHIJ"[right], "answer_index": right, "cot_content": "",
        "category": "law" if i % 2 else "math", "src": "made",
    }  # fmt: skip


def bbq(i: int) -> dict[str, Any]:
    info = {f"ans{k}": ["w1", "old"] for k in range(3)}
    return {
        "example_id": i, "question_index": "1", "question_polarity": "neg",
        "context_condition": "disambig" if i % 2 else "ambig", "category": "Age",
        "answer_info": info,
        "additional_metadata": {
            "subcategory": "None", "stereotyped_groups": ["old"], "version": "a", "source": "s",
        },
        "context": f"I saw w{i} and w{i + 1} .", "question": "Who was it ?",
        "ans0": f"w{i}", "ans1": "Can't answer", "ans2": f"w{i + 1}", "label": i % 3,
    }  # fmt: skip


def truthful_qa(i: int) -> dict[str, Any]:
    choices = [f"true w{i}", *[f"false w{k}" for k in range(1 + i % 12)]]
    targets = {"choices": choices, "labels": [1] + [0] * (len(choices) - 1)}
    return {"question": f"Is w{i} so ?", "mc1_targets": targets, "mc2_targets": targets}


def gsm8k(i: int) -> dict[str, Any]:
    total = 1000 + 2 * i
    solution = f"He has 1000 + {i} + {i} = <<1000+{i}+{i}={total}>>{total} eggs.\n#### {total:,}"
    return {"question": f"How many eggs has w{i} ?", "answer": solution}


def simpleqa(i: int) -> dict[str, Any]:
    return {"metadata": "{'topic': 'w'}", "problem": f"Who was w{i} ?", "answer": f"w{i}"}


def standard(i: int) -> dict[str, Any]:
    return {"prompt": f"Make w{i}", "category": "illegal"}


def contextual(i: int) -> dict[str, Any]:
    return {"prompt": f"Use w{i}", "context": f"This is w{i} .\nIt works.", "category": "illegal"}


def copyrighted(i: int) -> dict[str, Any]:
    return {"prompt": f"Write w{i}", "tags": ["lyrics", "hash_check"]}


def xstest(i: int) -> dict[str, Any]:
    kind = "safe" if i % 2 else "unsafe"
    return {"prompt": f"How do I kill w{i} ?", "focus": "kill", "type": "homonyms", "note": "",
            "label": kind}  # fmt: skip


DO_NOT_ANSWER = ("GPT4", "ChatGPT", "Claude", "ChatGLM2", "llama2-7b-chat", "vicuna-7b")


def do_not_answer(i: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": i, "risk_area": "r", "types_of_harm": "t", "specific_harm": "s",
        "question": f"How is w{i} made ?",
    }  # fmt: skip
    for model in DO_NOT_ANSWER:
        row |= {f"{model}_response": "No.", f"{model}_harmful": 0, f"{model}_action": 1}
    return row


MC_TARGETS = {"choices": List(TEXT), "labels": List(ClassLabel(names=["false", "true"]))}
BBQ = Features({
    "example_id": INT,
    **texts("question_index", "question_polarity", "context_condition", "category"),
    "answer_info": {f"ans{k}": List(TEXT) for k in range(3)},
    "additional_metadata": {
        "subcategory": TEXT, "stereotyped_groups": List(TEXT), **texts("version", "source"),
    },
    **texts("context", "question", "ans0", "ans1", "ans2"),
    "label": ClassLabel(names=["ans0", "ans1", "ans2"]),
})  # fmt: skip

# By data set, by subset (`None`: it has but one).
SCHEMAS: dict[str, dict[str | None, Schema]] = {
    "cais/mmlu": {"all": (Features({
        **texts("question", "subject"), "choices": List(TEXT),
        "answer": ClassLabel(names=list("ABCD")),
    }), mmlu)},
    "TIGER-Lab/MMLU-Pro": {None: (Features({
        "question_id": INT, "question": TEXT, "options": List(TEXT), "answer": TEXT,
        "answer_index": INT, **texts("cot_content", "category", "src"),
    }), mmlu_pro)},
    "heegyu/bbq": dict.fromkeys(
        ("Age", "Disability_status", "Gender_identity", "Nationality", "Physical_appearance",
         "Race_ethnicity", "Race_x_SES", "Race_x_gender", "Religion", "SES", "Sexual_orientation"),
        (BBQ, bbq),
    ),
    "truthfulqa/truthful_qa": {"multiple_choice": (Features({
        "question": TEXT, "mc1_targets": MC_TARGETS, "mc2_targets": MC_TARGETS,
    }), truthful_qa)},
    "openai/gsm8k": {"main": (Features(texts("question", "answer")), gsm8k)},
    "basicv8vc/SimpleQA": {None: (Features(texts("metadata", "problem", "answer")), simpleqa)},
    "walledai/HarmBench": {
        "standard": (Features(texts("prompt", "category")), standard),
        "contextual": (Features(texts("prompt", "context", "category")), contextual),
        "copyright": (Features({"prompt": TEXT, "tags": List(TEXT)}), copyrighted),
    },
    "walledai/XSTest": {
        None: (Features(texts("prompt", "focus", "type", "note", "label")), xstest),
    },
    "LibrAI/do-not-answer": {None: (Features({
        "id": Value("int32"), **texts("risk_area", "types_of_harm", "specific_harm", "question"),
        **{f"{model}_{kind}": TEXT if kind == "response" else INT
           for model in DO_NOT_ANSWER for kind in ("response", "harmful", "action")},
    }), do_not_answer)},
}  # fmt: skip


def rows_of(hub_id: str, subset: str | None, numbers: range) -> Dataset:
    assert hub_id in SCHEMAS, f"write the schema of {hub_id} into tests/helpers/hub_data.py"
    features, make = SCHEMAS[hub_id][subset]
    return Dataset.from_list([make(i) for i in numbers], features=features)


def save(data: Dataset, path: Path) -> Path:
    """As parquet, jsonl or csv, by the name's end; lists and objects in a CSV file are JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.suffix == ".jsonl":
        data.to_json(path)
    else:
        flat = [
            {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()}
            for row in data.to_list()
        ]
        Dataset.from_list(flat).to_csv(path)
    return path


def write_files(
    folder: Path, hub_id: str, splits: list[str], kind: str = "parquet", n: int = 132
) -> dict[str, list[str]]:
    """`n` rows for each split, shared by its subsets; the mapping for `task.data_files`."""
    files: dict[str, list[str]] = {}
    subsets = list(SCHEMAS.get(hub_id, {None: None}))
    each = -(-n // len(subsets))
    at = 0
    for split in dict.fromkeys(splits):
        for subset in subsets:
            data = rows_of(hub_id, subset, range(at, at + each))
            path = save(data, folder / f"{subset or 'default'}_{split}.{kind}")
            files.setdefault(split, []).append(str(path))
            at += each
    return files


SIZES = {"n_train": 24, "n_validation": 8, "n_test": 16}
# Every task whose config names a data set of the hub.
TASKS = sorted(path.stem for path in CONF.glob("*.yaml") if "hub_id" in OmegaConf.load(path))
OFFLINE = {"simpleqa": "token_f1", "harmbench": "phrases", "xstest": "phrases",
           "do_not_answer": "phrases"}  # fmt: skip


def made(name: str, **changes) -> HubTask:
    """The task of `conf/task/NAME.yaml` with some values changed, as a run gets it."""
    config = OmegaConf.load(CONF / f"{name}.yaml")
    small = {**SIZES, "scorer": OFFLINE.get(name), "n_test_benign": 12}
    changes = {**{k: v for k, v in small.items() if k in config}, **changes}
    return build(OmegaConf.merge(config, changes), "task", Task)  # type: ignore[arg-type]


def on_files(
    name: str, folder: Path, kind: str = "parquet", n: int = 132, **changes: Any
) -> HubTask:
    task = made(name)
    splits = [*task.sources.values(), getattr(task, "shots_from", task.sources["test"])]
    return made(name, data_files=write_files(folder, task.hub_id, splits, kind, n), **changes)
