"""Tasks of lm-eval's kind in the tiny model's words, their data in local files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

SIZES = {"train": 40, "validation": 8, "test": 30}
MORE = {
    # By kind of task: what its YAML says besides, its data being those of `write_data`.
    "index": {"doc_to_choice": ["w1 w2", "w30"], "doc_to_target": "right"},
    "text": {"doc_to_choice": ["w1 w2", "w30"], "doc_to_target": "{{['w1 w2', 'w30'][right]}}"},
    "letter": {
        "doc_to_choice": "options", "doc_to_target": "{{['A', 'B', 'C', 'D'].index(letter)}}",
    },
    "own": {"doc_to_choice": "options", "doc_to_target": "{{place}}"},
    "few": {
        "doc_to_choice": "options", "doc_to_target": "place", "num_fewshot": 2,
        "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"},
        "description": "w50 w51 ", "target_delimiter": "", "fewshot_delimiter": " w9 ",
        "doc_to_text": "{{question}} ",
    },
}  # fmt: skip


def write_data(folder: Path, seed: int = 0, sizes: dict[str, int] | None = None) -> dict[str, str]:
    """A JSON-lines file for each split, all questions different; returns them by split."""
    draw = random.Random(seed)
    words = [f"w{i}" for i in range(58)]
    files, seen = {}, set()
    for split, n in (sizes or SIZES).items():
        rows = []
        while len(rows) < n:
            question = " ".join(draw.choices(words, k=draw.randint(3, 8)))
            if question in seen:
                continue
            seen.add(question)
            options = []
            while len(options) < draw.choice([2, 3, 4]):
                option = " ".join(draw.choices(words, k=draw.choice([1, 1, 2, 3])))
                options += [option] * (option not in options)
            place = draw.randrange(len(options))
            rows.append({
                "question": question, "options": options, "place": place, "letter": "ABCD"[place],
                "right": draw.randrange(2),
            })  # fmt: skip
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[split] = str(path)
    return files


def write_yaml(folder: Path, kind: str, files: dict[str, str], **more: object) -> Path:
    """The YAML file of a task of this kind. more: keys of it; None leaves one out."""
    said = {
        "task": f"tiny_{kind}", "dataset_path": "json", "dataset_kwargs": {"data_files": files},
        "output_type": "multiple_choice", "training_split": "train",
        "validation_split": "validation", "test_split": "test", "doc_to_text": "{{question}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm", "acc_bytes")
        ],
        **MORE[kind], **more,
    }  # fmt: skip
    path = folder / f"tiny_{kind}.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in said.items() if v is not None}))
    return path


def typed(path: Path, *more: str) -> list[str]:
    sizes = ("task.n_train=24", "task.n_validation=8", "task.n_test=null")
    return ["task=lm_eval", f"task.lm_eval_task={path}", *sizes, *more]
