"""The configs of a sweep's points, as Hydra composes them, what they share composed only once.

Reading the YAML files and merging them takes Hydra a good tenth of a second. Points that choose the
same options share that; their values are set on a copy, by Hydra's own function.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import cached_property

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, open_dict

from crl_exp.config import own_code
from crl_exp.config.errors import UserError

RESOURCES = "hydra.launcher."


class Composer:
    """Composes points of one sweep.

    master: the sweep's own config, with Hydra's node.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig):
        self._loader, self._master = loader, master
        self._parser = OverridesParser.create(config_loader=loader)
        self._parsed: dict[str, Override] = {}
        # Pickled, since OmegaConf copies a config five times as fast by that as by deepcopy.
        self._bases: dict[tuple[str, ...], bytes | Exception] = {}

    @cached_property
    def _beside(self) -> list[str]:
        return list(own_code.beside_configs(self._master.hydra))

    @property
    def n_composed(self) -> int:
        """How often the YAML files have been composed."""
        return len(self._bases)

    def config(self, overrides: Sequence[str]) -> tuple[DictConfig, list[str]]:
        """A point's config without Hydra's node, and its overrides of the launcher's settings.

        Raises what Hydra raises for a fault, and `UserError` for a point that would change Hydra.
        """
        choices, values, resources = [], [], []
        for text in overrides:
            override = self._parse(text)
            key = override.key_or_group
            if key.startswith(RESOURCES):
                resources.append(text)
            elif key.startswith(("hydra.", "hydra/")):
                raise UserError(f"{text}: can't differ between the points of a sweep")
            elif self._chooses(override):
                choices.append(text)
            else:
                values.append(override)
        config = pickle.loads(self._base(tuple(choices)))
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        own_code.note_folders(config, self._beside)
        return config, resources

    def _parse(self, text: str) -> Override:
        if text not in self._parsed:
            self._parsed[text] = self._parser.parse_override(text)
        return self._parsed[text]

    def _chooses(self, override: Override) -> bool:
        """Whether Hydra takes it for the choice of an option; else it sets a value afterwards."""
        assert isinstance(self._loader, ConfigLoaderImpl)
        is_group = self._loader.repository.group_exists(override.key_or_group)
        return is_group and not isinstance(override.value(), dict)

    def _base(self, choices: tuple[str, ...]) -> bytes:
        if choices not in self._bases:
            try:
                base = self._loader.load_sweep_config(self._master, list(choices))
                with open_dict(base):
                    del base["hydra"]
                self._bases[choices] = pickle.dumps(base)
            except Exception as error:  # the same for every point with these choices
                self._bases[choices] = error
        found = self._bases[choices]
        if isinstance(found, Exception):
            raise found
        return found
