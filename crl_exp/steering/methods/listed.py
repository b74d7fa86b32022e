"""A given list of features, steered as they are: without stage 1, and chosen by nobody here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Controller
from crl_exp.steering.controllers.fixed import Steer
from crl_exp.steering.feature_lists import FeatureList, read_list, typed_list
from crl_exp.steering.kept_run import KeptRun
from crl_exp.steering.methods.base import Method
from crl_exp.steering.methods.corrsteer import NOTHING_BY_0, best_scale, multiplier_faults
from crl_exp.steering.workspace import SteeringConfig, Workspace


@dataclass
class Listed(Method):
    """Adds the features of a list with their coefficients, at every steered token.

    features: [[layer, feature, coefficient], …], typed; or null.
    path: a CSV file with these columns, or a finished run's folder or features.json, for what it
        steered by; or null. One of the two is given.
    which: of the lists that a CSV file holds, by its column `list`; null: its only one.
    multipliers: of all coefficients together; of several the one that does best on validation.
    """

    label = "listed features"

    features: list[Any] | None
    path: str | None
    which: str | None
    multipliers: list[float]

    @property
    def needs_statistics(self) -> bool:
        return False

    @property
    def nothing_instead(self) -> str:
        return NOTHING_BY_0

    def faults(self) -> list[str]:
        found = multiplier_faults(self.multipliers)
        if (self.features is None) == (self.path is None):
            found.append(
                "method=listed: give either method.features=[[layer,feature,coefficient],…] or "
                "method.path=FILE.csv, or the folder of a finished run"
            )
        return found

    def listed(self) -> FeatureList:
        """Raises `UserError` where the list can't be read."""
        if self.path is not None:
            return read_list(self.path, self.which)
        return typed_list(self.features or [])

    def conflicts(self, exp: SteeringConfig) -> list[str]:
        try:
            listed = self.listed()
            if found := listed.faults():
                return found
            layers = exp.layers.wanted(exp.sae.available)
        except UserError as error:
            return [str(error)]
        found = []
        if sorted(set(layers)) != listed.layers:
            asked = ",".join(map(str, listed.layers))
            found.append(
                f"{listed.where} has the layers {asked}; set layers=list 'layers.layers=[{asked}]'"
            )
        return found + other_sae(listed, exp) + _out_of_range(listed, exp)

    def prepare(self, workspace: Workspace) -> Controller:
        steers = [
            Steer(one.layer, one.feature, one.coefficient)
            for one in self.listed().features
            if one.layer in workspace.saes
        ]
        return workspace.fixed(best_scale(workspace, steers, self.multipliers)[0])

    def restored(self, kept: KeptRun) -> Controller:
        return kept.fixed()


def other_sae(listed: FeatureList, exp: SteeringConfig) -> list[str]:
    """Where the list says which SAE its numbers belong to, and another one is to be steered by."""
    ours = {
        "release": exp.sae.release, "folder": exp.sae.folder, "id_template": exp.sae.id_template,
        "dictionary": exp.sae.dictionary,
    }  # fmt: skip
    if exp.sae.release is None and "folder" not in listed.sae:
        # A copy on disk of what the card names as a release: its width is compared below.
        ours = {"dictionary": exp.sae.dictionary}
    differing = [
        f"sae.{key}={listed.sae[key]}, not {value}"
        for key, value in ours.items()
        if key in listed.sae and listed.sae[key] != value
    ]
    if not differing:
        return []
    return [
        f"{listed.where} is of another SAE ({'; '.join(differing)}), where the same numbers are "
        "other features; choose its sae=…"
    ]


def _out_of_range(listed: FeatureList, exp: SteeringConfig) -> list[str]:
    found = []
    for one in listed.features:
        try:
            d_sae = exp.sae.metadata(one.layer).d_sae
        except UserError:
            continue  # told where every layer's SAE is looked at
        wrong = listed.sae.get("d_sae", d_sae) != d_sae
        if d_sae is not None and (one.feature >= d_sae or wrong):
            says = f", and the list is of one with {listed.sae['d_sae']}" if wrong else ""
            found.append(
                f"{listed.where}: layer {one.layer}, feature {one.feature}: the SAE there has "
                f"{d_sae} features{says}"
            )
    return found
