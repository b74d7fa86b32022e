"""The pages about options, made from `conf/` and the classes' docstrings.

An option's YAML file gives its line (first comment), its source and what the author reported
(`# source: …; reported: …`) and its values; the class or schema that it fills says what the values
mean. Nothing of it is written by hand, so that no page can disagree with what runs.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import OmegaConf

from crl_exp.config.paths import REPO
from crl_exp.experiments.config import TYPED

CONF = REPO / "conf"
INDEX, PAGES = "options.md", "options"
"""In docs/: the list of all options, and the folder of the pages."""
WIDTH = 100
# In the order of an experiment; groups that aren't named come after, those left out are presets.
GROUPS = {
    "experiment": "What a run does",
    "model": "The language model",
    "sae": "Its sparse autoencoders",
    "task": "What is asked, and how answers are scored",
    "layers": "Where is steered",
    "method": "How what is added comes about, and what it is held against",
    "warmup": "Stage 1: how features go with success",
    "policy": "Stage 2: the networks, and what they choose between",
    "fusion": "How stage 1's correlation enters the policy's logits",
    "activation": "What the logits pass through",
    "noise": "How the policy explores",
    "mask": "Which features may be chosen at a token",
    "coefficient": "How strongly a feature is added",
    "decay": "Whether steering fades over the answer",
    "algorithm": "What stage 2 learns by",
    "engine": "How answers are generated: batches, memory, speed",
    "checkpoint": "How often a run is saved",
    "tracking": "Where results are sent besides the run directory",
}
LEFT_OUT = ("sweep", "preset", "debug", "hydra")
SOURCE = re.compile(r"#\s*source:\s*(?P<source>.*?)(?:;\s*reported:\s*(?P<reported>.*))?$")

MADE = (
    "Made by `python -m crl_exp options` from `conf/` and docstrings: change those, not this page."
)
HEADER = f"""# Options

{MADE}

An option is chosen by `GROUP=NAME`, a value in it set by `GROUP.KEY=VALUE`; the default of each
group is in bold. (`method=crl`, the default, and `attribution` take `coefficient=relative` unless
`coefficient=` is typed, `crl_published` takes `unit`; all other methods take the bold one.)
*Reported* is what the method's author said of the option (numbers are accuracies in %), nothing
measured here. CRL is arXiv 2602.10437, CorrSteer arXiv 2508.12535.

The four stages of the logits (fusion, noise, activation, mask) run in the order of the list
`order`, by default `[fusion, noise, activation, mask]`; any of the 24 orders can be set. Stages
named `…_author` are in the form in which the method's author wrote them, those without the ending
in ours.
"""


@dataclass(frozen=True)
class Option:
    """One file of `conf/`. values: its keys as they are typed, `key=value`, without those of other
    groups."""

    group: str
    name: str
    line: str
    source: str
    reported: str
    values: tuple[str, ...]
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
        tuple(values),
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
    ordered = [name for name in GROUPS if name in names] + sorted(names - set(GROUPS))
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


def pages(conf: Path = CONF) -> dict[str, str]:
    """The text of every page, by its path in docs/."""
    chosen = defaults(conf)
    by_group = groups(conf)
    found = {INDEX: index(by_group, chosen)}
    for group, options in by_group.items():
        found[f"{PAGES}/{group}.md"] = page(group, options, chosen.get(group))
    return found


def index(by_group: dict[str, list[Option]], chosen: dict[str, str]) -> str:
    """The list of all options, a section a group, so that links to `options.md#GROUP` are good."""
    parts = [HEADER]
    for group, options in by_group.items():
        names = ", ".join(_shown(option, chosen.get(group)) for option in options)
        what = f"{GROUPS[group]}. " if group in GROUPS else ""
        parts += [f"## {group}\n", f"{what}[All of {group}]({PAGES}/{group}.md):\n"]
        parts += [_wrapped(names), ""]
    return "\n".join(parts).rstrip() + "\n"


def page(group: str, options: Sequence[Option], chosen: str | None) -> str:
    """A group's page: a table, what the values mean, and each option's values."""
    what = f"{GROUPS[group]}. " if group in GROUPS else ""
    parts = [
        f"# Options: {group}\n",
        f"{MADE}\n",
        f"{what}The default is in bold; [all groups](../{INDEX}).\n",
        "| option | what it does | source | reported |",
        "|---|---|---|---|",
    ]
    for option in options:
        cells = (_shown(option, chosen), option.line, option.source, option.reported)
        parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    parts.append("")
    parts += _meanings(options)
    parts.append("## Values\n")
    for option in options:
        if option.values:
            parts += [f"`{group}={option.name}`:\n", "```text"]
            parts += [_wrapped(value) for value in option.values]
            parts += ["```", ""]
        else:
            parts.append(f"`{group}={option.name}` has none.\n")
    return "\n".join(parts).rstrip() + "\n"


def _shown(option: Option, chosen: str | None) -> str:
    return f"**{option.name}**" if option.name == chosen else option.name


def _wrapped(text: str) -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent="    " if "=" in text else "", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _meanings(options: Sequence[Option]) -> list[str]:
    """What the values mean: each class's docstring once, under the options that it holds for. A
    base's comes after those of its classes."""
    of_class: dict[type, list[str]] = {}
    for option in options:
        for cls in _documented(option.cls):
            of_class.setdefault(cls, []).append(option.name)
    own = {option.cls for option in options}
    found = []
    for cls, names in sorted(of_class.items(), key=lambda one: one[0] not in own):
        every = len(names) == len(options) > 1
        heading = "All of them" if every else ", ".join(names)
        known = {f.name for f in fields(cls) if f.init}
        found += [f"## {heading}\n", _listed(inspect.cleandoc(cls.__doc__ or ""), known), ""]
    return found


def _documented(cls: type | None) -> list[type]:
    """The class, and those of its bases here that explain further values."""
    if cls is None or not fields(cls) or not cls.__doc__:
        return []
    known = {f.name for f in fields(cls) if f.init}
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("crl_exp.")]
    return [
        cls,
        *(b for b in bases if b.__doc__ and set(vars(b).get("__annotations__", {})) & known),
    ]


def _listed(text: str, known: set[str]) -> str:
    """A docstring with an entry of a list where a line begins with names of values."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        names, colon, meaning = line.partition(": ")
        if colon and {name.strip() for name in names.split(",")} <= known:
            if not inside and lines and lines[-1]:
                lines.append("")
            shown = ", ".join(f"`{name.strip()}`" for name in names.split(","))
            lines.append(f"- {shown}: {meaning}")
            inside = True
        elif inside and line.strip() and not line.startswith(" "):
            lines += ["", line] if lines[-1] else [line]
            inside = False
        else:
            lines.append(f"  {line.strip()}" if inside and line.strip() else line)
    return "\n".join(lines).strip()
