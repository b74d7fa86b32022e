"""Modules of a user's own: the folders that they lie in, and what is taken from them.

`own_code` of a config lists folders, absolute. They come last on `sys.path`, behind all libraries,
in whatever process deals with the config: the launch, a job, a command. A run's frozen config has
the list, so that whoever goes on with the run finds them from anywhere.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from crl_exp.config.errors import UserError
from crl_exp.config.files import home

KEY = "own_code"
DIGEST_CHARS = 16
_FOLDERS: list[Path] = []
"""Those that this process has been told of."""
_IMPORTED: dict[str, str] = {}
"""Digests of modules' files when they were imported here."""


class OwnCodeError(UserError):
    """A user's own folder, module, class or function can't be had here."""


def use(config: DictConfig) -> list[str]:
    """Have a config's folders on the path; returns those that aren't there."""
    gone = []
    for text in config.get(KEY) or []:
        folder = home(str(text), KEY).absolute()
        if not folder.is_dir():
            gone.append(str(folder))
        elif folder not in _FOLDERS:
            _FOLDERS.append(folder)
            importlib.invalidate_caches()
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return gone


def check(config: DictConfig) -> None:
    """`use`; raises `OwnCodeError` where a folder isn't there."""
    if gone := use(config):
        raise OwnCodeError(
            f"{KEY}: there is no folder {', '.join(gone)} on this machine, where the run's own "
            "modules lie: put it back, or on a file system that all machines of the sweep share"
        )


def note(config: DictConfig, hydra: Any) -> None:
    """Write a composed config's folders as absolute paths into it, with those of YAML files of
    one's own (`--config-dir`) that hold modules too, and use them.

    hydra: Hydra's own part of the config. Raises `OwnCodeError` where a folder isn't there.
    """
    note_folders(config, beside_configs(hydra))


def note_folders(config: DictConfig, beside: Iterable[str]) -> None:
    """As `note` does. beside: folders beside YAML files of one's own (`beside_configs`)."""
    given = [str(home(str(one), KEY).absolute()) for one in config.get(KEY) or []]
    found = dict.fromkeys([*given, *beside])
    if list(found) != list(config.get(KEY) or []):
        with open_dict(config):
            config[KEY] = list(found)
    check(config)


def keep_working_directory(config: DictConfig, module: str, key: str) -> None:
    """Note the working directory where a module comes from there: whoever goes on with the run may
    be elsewhere."""
    here = Path.cwd().resolve()
    top = source_of(module.partition(".")[0], key)
    folder = top.parents[1] if top.name == "__init__.py" else top.parent
    if folder == here and str(here) not in (config.get(KEY) or []):
        with open_dict(config):
            config[KEY] = [*(config.get(KEY) or []), str(here)]
        use(config)


def beside_configs(hydra: Any) -> Iterator[str]:
    """Folders of YAML files of one's own that hold modules too, by Hydra's part of a config."""
    for source in hydra.runtime.config_sources:
        folder = Path(source.path)
        if source.schema != "file" or source.provider == "main" or not folder.is_dir():
            continue
        if any(folder.glob("*.py")) or any(folder.glob("*/__init__.py")):
            yield str(folder.absolute())


def holds(module: str) -> bool:
    """Whether a module lies in one of the folders."""
    top = module.partition(".")[0]
    if top == "crl_exp":  # of a checkout that somebody works in
        return False
    return any((f / f"{top}.py").is_file() or (f / top).is_dir() for f in _FOLDERS)


def source_of(module: str, key: str) -> Path:
    """A module's file. key: what of the config names it. Raises `OwnCodeError` where there is none,
    and where another module of the name is found before it."""
    top = module.partition(".")[0]
    try:
        spec = find_spec(top)
        if spec is not None and top != module:
            spec = find_spec(module)  # imports what it lies in
    except Exception as error:
        raise OwnCodeError(f"{key}: {_told(module, error)}") from error
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise OwnCodeError(
            f"{key}: there is no module {module} on this machine. Modules are looked for in the "
            f"working directory ({Path.cwd()}), in {KEY} ({_shown()}) and among the installed "
            f"ones: launch from the folder that it lies in, or name the folder, {KEY}=[/a/folder]; "
            "nodes of a cluster must see it under the same path"
        )
    path = Path(spec.origin).resolve()
    if holds(module) and not any(path.is_relative_to(f.resolve()) for f in _FOLDERS):
        raise OwnCodeError(
            f"{key}: the module {module} of {KEY} ({_shown()}) is hidden by {path}, which has its "
            "name and comes first; give it another name"
        )
    return path


def _shown() -> str:
    return ", ".join(map(str, _FOLDERS)) or "none"


def _told(module: str, error: BaseException) -> str:
    return f"{module} can't be imported ({type(error).__name__}: {error})"


def loaded(name: str, key: str) -> Any:
    """What a dotted name stands for, its module imported. Raises `OwnCodeError` where it can't be
    had."""
    module, _, attribute = name.rpartition(".")
    digest = source_digest(module, key)
    known = module in sys.modules and module not in _IMPORTED
    try:
        made = importlib.import_module(module)
        if known and _of_ones_own(made):  # imported before, by a notebook say, and edited since
            made = importlib.reload(made)
        if _IMPORTED.setdefault(module, digest) != digest:  # edited since, beside a notebook say
            made = importlib.reload(made)
            _IMPORTED[module] = digest
    except Exception as error:  # whatever a user's module does when it is imported
        raise OwnCodeError(f"{key}: {_told(module, error)}") from error
    if not hasattr(made, attribute):
        raise OwnCodeError(f"{key}: {made.__file__} has no {attribute}")
    return getattr(made, attribute)


def _of_ones_own(module: Any) -> bool:
    """Whether a module lies in one of the folders, or in the working directory."""
    path = Path(str(getattr(module, "__file__", None) or "/")).resolve()
    return any(path.is_relative_to(folder.resolve()) for folder in [*_FOLDERS, Path.cwd()])


def function(name: str, key: str, arguments: tuple[str, ...]) -> Callable[..., Any]:
    """A function that takes these arguments by position.

    Raises `OwnCodeError` as `loaded` does, and for what can't be called so.
    """
    found = loaded(name, key)
    if not callable(found):
        raise OwnCodeError(f"{key}: is a {type(found).__name__}, not a function")
    try:
        inspect.signature(found).bind(*arguments)
    except TypeError as error:
        raise OwnCodeError(
            f"{key}: must be called as {name.rpartition('.')[2]}({', '.join(arguments)}); {error}"
        ) from error
    except ValueError:  # of one written in C nothing is known before it is called
        pass
    return found


def name_fault(name: str) -> str:
    """What is wrong with the dotted name of a function; "" for nothing."""
    parts = name.split(".")
    good = len(parts) > 1 and all(part.isidentifier() for part in parts)
    return "" if good else "must be MODULE.FUNCTION, as in rewards.score"


def source_digest(module: str, key: str) -> str:
    """Of a module's file; of what it imports nothing is known. Raises as `source_of` does."""
    try:
        content = source_of(module, key).read_bytes()
    except OSError as error:
        raise OwnCodeError(f"{key}: can't be read ({error})") from error
    return hashlib.sha256(content).hexdigest()[:DIGEST_CHARS]


def digests(targets: Iterable[tuple[str, str]]) -> dict[str, str]:
    """By key, of the modules of classes that aren't this package's. targets: keys and `_target_`s
    of a config's sections."""
    return {
        f"{key}={target}": source_digest(target.rpartition(".")[0], f"{key}={target}")
        for key, target in targets
    }
