"""What a method is: it makes what will be evaluated, mostly a controller."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.steering.answerer import Answering
from crl_exp.steering.kept_run import KeptRun
from crl_exp.steering.workspace import SteeringConfig, Workspace


@dataclass
class Method:
    """Base. name: what results are filed under.

    label: what a report calls it; None: its name. control: whether it is one, so that a report
    neither chooses among its layers nor holds it for a result. unsteered: whether it is the
    unsteered model itself, whose difference to it is nothing. variant_of: the published method that
    it is or changes, `crl` or `corrsteer`, which a report sets against each other; "" of others.
    """

    name: str
    label: ClassVar[str | None] = None
    control: ClassVar[bool] = False
    unsteered: ClassVar[bool] = False
    variant_of: ClassVar[str] = ""

    @property
    def needs_statistics(self) -> bool:
        """Whether stage 1 is made for it."""
        return True

    @property
    def uses_layers(self) -> bool:
        """Whether `layers` says anything to it; if not, no SAE is looked for."""
        return True

    @property
    def needs_sae(self) -> bool:
        """Whether it works with features; if not, residuals are enough (`sae=none`)."""
        return True

    @property
    def uses_dictionary(self) -> bool:
        """Whether it depends on what the SAE's decoder adds for a feature (`sae.dictionary`)."""
        return True

    @property
    def uses_seed(self) -> bool:
        """Whether chance is in it (a draw, training), so that another `seed` is another result. Of
        a method of one's own that doesn't say, it isn't known, and taken for so."""
        return not type(self).__module__.startswith("crl_exp.")

    @property
    def has_policy(self) -> bool:
        """Whether a policy chooses at each token, so that stages and `policy` are for it."""
        return False

    @property
    def trains_policy(self) -> bool:
        """Whether that policy is trained, by `algorithm` (stage 2)."""
        return False

    @property
    def updates_correlations(self) -> bool:
        """Whether stage 2 goes on measuring what stage 1 measured."""
        return False

    @property
    def nothing_instead(self) -> str:
        """What to set so that it does nothing where all that it tries does harm; "" if it can't."""
        return ""

    def faults(self) -> list[str]:
        return []

    def conflicts(self, exp: SteeringConfig) -> list[str]:
        """What of the rest of the config this method can't honour."""
        return []

    @abstractmethod
    def prepare(self, workspace: Workspace) -> Answering:
        """Find, choose or learn what answers the test items, on train and validation items only;
        for most methods a controller."""
        raise NotImplementedError

    def restored(self, kept: KeptRun) -> Controller:
        """The controller of a finished run, of what the run has kept; nothing is run for it.

        Raises `UserError` where that isn't enough, as for whatever answers otherwise than by adding
        features.
        """
        raise UserError(
            f"method={self.name}: what it answered by (a probe, adapted weights, vectors, other "
            "words) is not kept in a run, so it can't answer again"
        )


@dataclass
class WithoutFeatures(Method):
    """Base of those that have no use for features: they are spared stage 1."""

    @property
    def needs_statistics(self) -> bool:
        return False

    @property
    def needs_sae(self) -> bool:
        return False

    @property
    def uses_dictionary(self) -> bool:
        return False


@dataclass
class WithoutLayers(WithoutFeatures):
    """Base of those that don't look at residuals either: no SAE is looked for."""

    @property
    def uses_layers(self) -> bool:
        return False


@dataclass
class NoSteering(WithoutFeatures):
    """The unsteered model against itself: what a difference of zero looks like."""

    label = "unsteered"
    control = True
    unsteered = True

    def prepare(self, workspace: Workspace) -> Controller:
        return Unsteered()

    def restored(self, kept: KeptRun) -> Controller:
        return Unsteered()
