"""A task of lm-eval's by its name, or by a YAML file of one's own: its config, looked over.

lm-eval's own index reads 14,000 files with all that they include, for every process; here their
texts are searched for the name.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.files import home

KEY = "task.lm_eval_task"
_TASK = re.compile(r"""^task:[ \t]*["']?([^\s"'#\[{]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE)
_GROUP = re.compile(r"""^group:[ \t]*["']?([^\s"'#\[{]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE)
_TAG = re.compile(r"^tag:((?:.*\n)(?:[ \t]*-.*\n?)*)", re.MULTILINE)
MEMBERS = 6


def missing() -> str | None:
    """What a person is told where lm-eval isn't installed; None: it is."""
    if importlib.util.find_spec("lm_eval") is not None:
        return None
    return (
        "task=lm_eval needs lm-eval, which isn't installed here: `pip install 'crl_exp[lm-eval]'`"
    )


def is_file(name: str) -> bool:
    """Whether a YAML file of one's own is meant, and not a name."""
    return name.endswith((".yaml", ".yml")) or "/" in name


def config_of(name: str) -> dict[str, Any]:
    """The task's config, with what it includes, functions loaded.

    Raises `UserError` where there is no such task, or it is one that can't be used; in one line.
    """
    if fault := missing():
        raise UserError(fault)
    path = _own_file(name) if is_file(name) else _shipped(name)
    where = f"{KEY}={name}"
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        found = load_yaml(path, resolve_func=False)
        if fault := cannot(found):
            raise UserError(f"{where}: {fault}")
        found = load_yaml(path, resolve_func=True)
    except UserError:
        raise
    # Functions that the file names are imported, and may fail in any way.
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else repr(error)
        kind = "is no YAML" if isinstance(error, yaml.YAMLError) else "can't be loaded"
        raise UserError(f"{where}: {path} {kind} ({said})") from error
    return {k: v for k, v in found.items() if k not in ("tag", "group", "task_list")}


def cannot(config: Mapping[str, Any]) -> str:
    """Why a task of this config can't be used; "" where it can."""
    listed = config.get("task")
    if "group" in config or isinstance(listed, list):
        return _of_members(_names(listed if isinstance(listed, list) else []))
    if "class" in config:
        return "is a task written in Python, which has no documents with options to read"
    kind = config.get("output_type", "generate_until")
    if kind != "multiple_choice":
        return (
            f"has output_type: {kind}, and only multiple_choice tasks have options whose "
            "probabilities are compared; answers in free text are scored by task=jsonl "
            "task.answer_kind=exact|number|f1"
        )
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        return "shows images or plays sound, which the models here don't take"
    if config.get("use_prompt"):
        return "is worded by promptsource (use_prompt), which isn't read here"
    if config.get("process_results"):
        return "scores by a function of its own (process_results), so that acc isn't its figure"
    if lacking := [k for k in ("doc_to_text", "doc_to_choice", "doc_to_target")
                   if config.get(k) is None]:  # fmt: skip
        return f"has no {', '.join(lacking)}"
    return ""


def _own_file(name: str) -> Path:
    path = home(name, KEY)
    if not path.is_file():
        raise UserError(f"{KEY}={name}: there is no such file")
    return path.absolute()


def _shipped(name: str) -> Path:
    """The file of one of lm-eval's tasks. Raises `UserError` for a name that is none, or of a group
    or tag, with its members or the nearest names."""
    tasks, groups = _index()
    if name in tasks:
        return tasks[name]
    if name in groups:
        from lm_eval.tasks._yaml_loader import load_yaml

        members = _names(load_yaml(groups[name], resolve_func=False).get("task") or [])
        raise UserError(f"{KEY}={name}: {_of_members(members)}")
    tagged = sorted(_tagged(name))
    if tagged:
        raise UserError(f"{KEY}={name}: {_of_members(tagged)}")
    raise UserError(
        f"{KEY}={name}: lm-eval has no task of this name{did_you_mean(name, tasks)}; "
        "`lm-eval ls tasks` lists them; a file of your own ends in .yaml"
    )


def _files() -> Iterator[Path]:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    yield from sorted((Path(spec.submodule_search_locations[0]) / "tasks").glob("**/*.yaml"))


@cache
def _index() -> tuple[dict[str, Path], dict[str, Path]]:
    """The file of each task and each group. Of two of one name the first counts, as in lm-eval."""
    tasks: dict[str, Path] = {}
    groups: dict[str, Path] = {}
    for path in _files():
        text = path.read_text(encoding="utf-8", errors="replace")
        for pattern, found in ((_GROUP, groups), (_TASK, tasks)):
            if match := pattern.search(text):
                found.setdefault(match[1], path)
                break  # a group's `task:` names its members
    return tasks, groups


def _tagged(name: str) -> Iterator[str]:
    """The tasks of a tag. One may have it from a file that it includes, which lies beside it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    folders = set()
    for path in _files():
        tags = _TAG.search(path.read_text(encoding="utf-8", errors="replace"))
        if tags and name in re.findall(r"[\w.\-]+", tags[1]):
            folders.add(path.parent)
    for task, path in _index()[0].items():
        if path.parent in folders:
            tags = load_yaml(path, resolve_func=False).get("tag") or []
            if name in ([tags] if isinstance(tags, str) else tags):
                yield task


def _names(members: list[Any]) -> list[str]:
    found = []
    for one in members:
        named = (one.get("task") or one.get("group")) if isinstance(one, dict) else one
        found += _names(named) if isinstance(named, list) else [str(named)]
    return found


def _of_members(members: list[str]) -> str:
    shown = ", ".join(members[:MEMBERS]) + (", …" if len(members) > MEMBERS else "")
    said = f": {shown}; name one of these" if members else ""
    return f"is a group of {len(members)} tasks{said}"
