"""`python -m crl_exp options`: writes docs/options.md from `conf/` and the classes' docstrings.

An option's YAML file gives its line (first comment), its source and what the author reported
(`# source: …; reported: …`) and its values; the class or schema that it fills says what the values
mean. Nothing is written by hand, so that the page can't disagree with what runs.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import OmegaConf

from crl_exp.config.paths import REPO
from crl_exp.experiments.config import TYPED

CONF, PAGE = REPO / "conf", REPO / "docs" / "options.md"
# In the order of an experiment; groups that aren't named come after, those left out are presets.
FIRST = (
    "experiment", "model", "sae", "task", "layers", "method", "warmup", "policy", "fusion",
    "activation", "noise", "mask", "coefficient", "decay", "algorithm", "engine", "checkpoint",
    "tracking",
)  # fmt: skip
LEFT_OUT = ("sweep", "preset", "debug", "hydra")
SOURCE = re.compile(r"#\s*source:\s*(?P<source>.*?)(?:;\s*reported:\s*(?P<reported>.*))?$")

HEADER = """# Options

Made by `python -m crl_exp options` from `conf/` and the docstrings: change those, not this page.

An option is chosen by `GROUP=NAME`, a value in it set by `GROUP.KEY=VALUE`; the default of each
group is in bold. (`method=crl`, the default, takes `coefficient=relative` unless `coefficient=` is
typed; all other methods take the bold one.) *Reported* is what the method's author said of the
option (numbers are accuracies in %), nothing measured here. CRL is arXiv 2602.10437, CorrSteer
arXiv 2508.12535.

The four stages of the logits run in the order of the list `order`, by default
`[fusion, noise, activation, mask]`; any of the 24 orders can be set. Stages named `…_author` are in
the form in which the method's author wrote them, those without the ending in ours.
"""


@dataclass(frozen=True)
class Option:
    """One file of `conf/`. values: its keys, as they are typed, without those of other groups."""

    group: str
    name: str
    line: str
    source: str
    reported: str
    values: str
    cls: type | None


def read_option(path: Path) -> Option:
    """Raises `AssertionError` where the file doesn't begin with a line that says what it is."""
    group, text = path.parent.name, path.read_text(encoding="utf-8")
    comments = [line for line in text.splitlines() if line.startswith("#")]
    package = "# @package"
    lines = [line for line in comments if not line.startswith(package) and not SOURCE.match(line)]
    assert lines, f"{path}: the first line must be a comment that says what the option is"
    found = next((m for line in comments if (m := SOURCE.match(line))), None)
    node = OmegaConf.load(path)
    target = node.get("_target_")  # type: ignore[union-attr]
    values = [
        f"{key}={_plain(value)}"
        for key, value in OmegaConf.to_container(node).items()  # type: ignore[union-attr]
        if key not in ("_target_", "defaults", "name")
    ]
    return Option(
        group,
        path.stem,
        lines[0].lstrip("# ").strip(),
        found["source"] if found else "–",
        (found["reported"] if found else None) or "–",
        ", ".join(values) or "–",
        _class(str(target)) if target else TYPED.get(group),
    )


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower() if value is not None else "null"
    if isinstance(value, list):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    text = str(value)
    # What a line can't show, or would seem to be something else, is in quotes, as YAML has it.
    return text if text.strip() == text and "\n" not in text and text else json.dumps(text)


def _class(target: str) -> type:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def groups(conf: Path) -> dict[str, list[Option]]:
    """All options by group, in the page's order."""
    names = {path.parent.name for path in conf.glob("*/*.yaml")} - set(LEFT_OUT)
    ordered = [name for name in FIRST if name in names] + sorted(names - set(FIRST))
    return {
        name: [read_option(path) for path in sorted((conf / name).glob("*.yaml"))]
        for name in ordered
    }


def defaults(conf: Path) -> dict[str, str]:
    """The option that `conf/config.yaml` chooses for each group."""
    chosen: dict[str, str] = {}
    for entry in OmegaConf.to_container(OmegaConf.load(conf / "config.yaml"))["defaults"]:  # type: ignore[index, call-overload]
        if isinstance(entry, dict):
            chosen |= {key: value for key, value in entry.items() if value is not None}
    return chosen


def page(conf: Path = CONF) -> str:
    """The text of docs/options.md."""
    chosen, parts = defaults(conf), [HEADER]
    for group, options in groups(conf).items():
        parts.append(f"## {group}\n")
        parts.append("| option | what it does | values | source | reported |")
        parts.append("|---|---|---|---|---|")
        for option in options:
            name = f"**{option.name}**" if chosen.get(group) == option.name else option.name
            cells = (name, option.line, option.values, option.source, option.reported)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
        parts += _meanings(options)
    return "\n".join(parts).rstrip() + "\n"


def _meanings(options: Sequence[Option]) -> list[str]:
    """What the values mean: the docstring of each class, once, under its options' names."""
    seen: dict[type, list[str]] = {}
    for option in options:
        if option.cls is not None:
            seen.setdefault(option.cls, []).append(option.name)
    found = []
    for cls, names in seen.items():
        if fields(cls) and cls.__doc__:
            text = " ".join(inspect.cleandoc(_documentation(cls)).split())
            found.append(f"- {', '.join(names)}: {text}")
    return [*found, ""] if found else []


def _documentation(cls: type) -> str:
    """The class's docstring, after it those of its bases here that explain further values."""
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("crl_exp.")]
    known = {f.name for f in fields(cls) if f.init}
    more = []
    for base in bases:
        own = set(vars(base).get("__annotations__", {})) & known
        if own and base.__doc__:
            more.append(inspect.cleandoc(base.__doc__))
    return "\n".join([inspect.cleandoc(cls.__doc__ or ""), *more])


def main(argv: Sequence[str]) -> int:
    """Writes the page; with --check says whether it is as it should be."""
    parser = argparse.ArgumentParser(prog="python -m crl_exp options", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    asked = parser.parse_args(argv)
    if asked.check:
        fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        print(f"{PAGE} is {'up to date' if fresh else 'stale: run `python -m crl_exp options`'}")
        return 0 if fresh else 1
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")
    return 0
