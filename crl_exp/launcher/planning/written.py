"""Texts that Hydra's command line or YAML reads as something else, refused with the quoted form.

`sweep_name=2024_11_29` is the number 20241129, `choices: [yes, no]` are true and false, and where a
text is meant they become "20241129" and "True" without a word. What was typed is what is meant: a
number passes where its text is what was written (`[1, 2]`), everything else is refused by name.
"""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from crl_exp.config.errors import UserError

OPENING = (OverrideLexer.EQUAL, OverrideLexer.BRACKET_OPEN, OverrideLexer.POPEN,
           OverrideLexer.COMMA, OverrideLexer.COLON)  # fmt: skip
CLOSING = (OverrideLexer.BRACKET_CLOSE, OverrideLexer.PCLOSE, OverrideLexer.COMMA,
           OverrideLexer.BRACE_CLOSE, -1)  # fmt: skip
"""Tokens before and after a value that stands by itself. -1: the end."""
READ_AS = {OverrideLexer.INT: int, OverrideLexer.FLOAT: float, OverrideLexer.BOOL: bool}
LAUNCHER = "hydra.launcher"
SWEPT = ("hydra.sweeper.grids", "hydra.sweeper.params")
"""Keys whose content is overrides itself."""


class Texts:
    """Which keys of a config, as overrides name them, hold a text or a list of texts.

    configs: of all points, as they are composed or as plain values, and one with Hydra's node
        where the launcher's settings matter.
    """

    def __init__(self, configs: Iterable[DictConfig | dict[str, Any]]):
        self.classes: dict[str, set[type]] = {}
        for section, cls in _classes({one for config in configs for one in _targets(config)}):
            self.classes.setdefault(section, set()).add(cls)

    def in_a_table(self, key: str) -> bool:
        """Whether it is of a table whose values may be anything (`sbatch`): of these a truth value
        is one, and a number is as it was written, or it is a text."""
        return self._any(_in_a_table, key)

    def __contains__(self, key: str) -> bool:
        return self._any(_is_text, key)

    def _any(self, holds: Callable[[type, str], bool], key: str) -> bool:
        """Whether it holds of a class that has the key, asked with the key inside of it."""
        return any(
            holds(cls, key.removeprefix(f"{section}.") if section else key)
            for section, classes in self.classes.items()
            for cls in classes
            if not section or key.startswith(f"{section}.")
        )


def _targets(config: DictConfig | dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The name of the class of each section that may have one of several, and of the launcher."""
    from crl_exp.experiments.config import PARTS

    for name in (*PARTS, LAUNCHER):
        if isinstance(config, dict):
            section = config.get(name)
            yield name, str(section.get("_target_") if isinstance(section, dict) else None)
        else:
            yield name, str(OmegaConf.select(config, f"{name}._target_"))


def _classes(targets: Iterable[tuple[str, str]]) -> Iterator[tuple[str, type]]:
    """The class of each section that has one of these, and of the others."""
    from crl_exp.config.sections import target_class
    from crl_exp.experiments.config import PARTS
    from crl_exp.experiments.schema import TYPED, Schema
    from crl_exp.launcher.settings import KINDS

    yield "", Schema
    yield from TYPED.items()
    for name, target in targets:
        if name == LAUNCHER:
            for kind, cls in KINDS.items():
                if target.lower().endswith(f"{kind.replace('_', '')}launcher"):
                    yield name, cls
            continue
        try:
            yield name, target_class(target, name, PARTS[name])
        except UserError:  # told when the section is built
            continue


def _kinds(cls: type, key: str) -> tuple[set[Any], str]:
    """Types that a key's first part may have, and the rest of the key."""
    name, _, rest = key.partition(".")
    hint = typing.get_type_hints(cls).get(name)
    return {hint, *typing.get_args(hint)}, rest


@cache
def _is_text(cls: type, key: str) -> bool:
    kinds, rest = _kinds(cls, key)
    if rest:
        return any(is_dataclass(kind) and _is_text(kind, rest) for kind in kinds)  # type: ignore[arg-type]
    return bool(kinds & {str, list[str]})


@cache
def _in_a_table(cls: type, key: str) -> bool:
    kinds, rest = _kinds(cls, key)
    return bool(rest) and any(typing.get_origin(kind) is dict for kind in kinds)


# --- the command line ---


def typed_faults(overrides: Sequence[str], texts: Texts) -> list[str]:
    """What of these overrides is another text than it was typed as."""
    found = []
    for line in overrides:
        key = re.match(r"[+~]*([^=@]+)", line)
        name = "" if key is None else key[1].replace("/", ".")
        free = texts.in_a_table(name)
        if name not in texts and not free:
            continue
        wrong = [
            token
            for token in _bare(line)
            if _other(token.text, READ_AS[token.type])
            and not (free and token.type in (OverrideLexer.BOOL, OverrideLexer.FLOAT))
        ]
        if wrong:
            quoted = line
            for token in reversed(wrong):
                quoted = f'{quoted[: token.start]}"{token.text}"{quoted[token.stop + 1 :]}'
            read = ", ".join(f"{t.text} as {_other(t.text, READ_AS[t.type])}" for t in wrong)
            found.append(f"{line}: a text is meant, and Hydra reads {read}: type "
                         f"{shlex.quote(quoted)}")  # fmt: skip
    return found


def _bare(line: str) -> Iterator[Any]:
    """Tokens that are a number or a truth value by themselves, not a part of a longer text."""
    lexer = OverrideLexer(InputStream(line))
    lexer.removeErrorListeners()
    stream = CommonTokenStream(lexer)
    stream.fill()
    tokens = [token for token in stream.tokens if token.type != OverrideLexer.WS]
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if token.type in READ_AS and before.type in OPENING and after.type in CLOSING:
            yield token


def _other(text: str, kind: type) -> str:
    """What a text becomes that is read as this; "" where that is the text itself."""
    if kind is bool:
        return "a truth value"
    try:
        return "" if str(kind(text)) == text else f"the number {kind(text)}"
    except ValueError:
        return ""


# --- YAML files ---


@dataclass(frozen=True)
class Source:
    """A YAML file. package: where its keys lie in the config, joined by dots."""

    path: Path
    package: str


def sources(hydra: DictConfig, jobs: Iterable[Sequence[str]] = ()) -> list[Source]:
    """The files that a config was composed from, and those that a sweep's points choose.

    hydra: Hydra's own node of the composed config.
    """
    folders = [Path(one.path) for one in hydra.runtime.config_sources if one.provider != "schema"]
    folders = [folder for folder in folders if folder.is_dir()]
    choices: dict[tuple[str, str], None] = {("", str(hydra.job.config_name)): None}
    choices |= dict.fromkeys((str(k), str(v)) for k, v in hydra.runtime.choices.items() if v)
    for key, _, value in (text.lstrip("+").partition("=") for job in jobs for text in job):
        choices[key, value] = None
    found: dict[Path, Source] = {}
    for group, option in choices:
        _collect(folders, group.partition("@")[0], option, found)
    return list(found.values())


def _collect(folders: Sequence[Path], group: str, option: str, found: dict[Path, Source]) -> None:
    """A file, and those of its group that it builds on."""
    for folder in folders:
        path = folder / group / f"{option.removesuffix('.yaml')}.yaml"
        try:
            if path in found or not path.is_file():
                continue
        except OSError:  # a value, longer than a file's name may be
            return
        text = path.read_text(encoding="utf-8")
        header = re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)
        package = header[1] if header else group.replace("/", ".")
        found[path] = Source(path, "" if package == "_global_" else package)
        loaded = yaml.load(text, Loader=get_yaml_loader())
        below = loaded.get("defaults") if isinstance(loaded, dict) else None
        for name in below if isinstance(below, list) else []:
            if isinstance(name, str) and name != "_self_":
                _collect(folders, group, name, found)
        return


def file_faults(files: Iterable[Source], texts: Texts) -> list[str]:
    """What of these files is another text than it is written as."""
    found = []
    for source in files:
        loader = get_yaml_loader()(source.path.read_text(encoding="utf-8"))
        try:
            root = loader.get_single_node()
            for key, node in _scalars(root, source.package):
                read = loader.construct_object(node)
                free = texts.in_a_table(key) and not isinstance(read, (bool, float))
                if (free or key in texts) and (other := _other_node(node, read)):
                    found.append(
                        f"{source.path}, line {node.start_mark.line + 1}: {key} is a text, and "
                        f'YAML reads {node.value} as {other}: write "{node.value}"'
                    )
        finally:
            loader.dispose()
    return found


def _scalars(node: Any, key: str) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Every value of a YAML tree with its key, as an override names it."""
    if isinstance(node, yaml.MappingNode):
        inside = "" if key.startswith(SWEPT) else key
        for name, child in node.value:
            if isinstance(name, yaml.ScalarNode):
                word = str(name.value).lstrip("+")
                yield from _scalars(child, f"{inside}.{word}" if inside else word)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _scalars(child, key)
    elif isinstance(node, yaml.ScalarNode):
        yield key, node


def _other_node(node: yaml.ScalarNode, read: Any) -> str:
    """What YAML reads a bare word as; "" where that is its text."""
    if node.style is not None or not isinstance(read, (bool, int, float)):
        return ""
    if isinstance(read, bool):
        return str(read).lower()
    return "" if str(read) == node.value else f"the number {read}"


def check_written(
    hydra: Any, configs: Iterable[DictConfig | dict[str, Any]], jobs: Iterable[Sequence[str]] = ()
) -> None:
    """Raise `UserError` with every text of the command line and of the files that would change.

    hydra: Hydra's own node, with what was typed. configs: those composed from it, or as
    plain values. jobs: overrides of a sweep's points.
    """
    texts = Texts([*configs, OmegaConf.create({"hydra": {"launcher": hydra.launcher}})])
    faults = typed_faults(list(hydra.overrides.task) + list(hydra.overrides.hydra), texts)
    if faults := faults + file_faults(sources(hydra, jobs), texts):
        raise UserError("\n".join(faults))
