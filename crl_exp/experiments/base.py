"""What a kind of experiment is: what it reads of the config, what it needs, and what it does.

The frame around it is the same for all kinds: run directory, resume, status, preemption, packs,
MLflow, sweeps, SLURM (`crl_exp.experiments.run`). A new kind is one class here and one YAML in
`conf/experiment/`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from crl_exp.runs.result import Result
from crl_exp.steering.workspace import SteeringConfig

NEEDS = ("layers", "sae", "feature_statistics")
"""What a run may need: layers to look at, their SAEs, stage 1."""


class Unread:
    """Stands for a section of the config that the kind of experiment doesn't read: its run key
    doesn't tell runs apart by it, so that nothing may depend on it."""

    def __init__(self, section: str, kind: str):
        object.__setattr__(self, "_where", (section, kind))

    def __getattr__(self, name: str) -> NoReturn:
        section, kind = object.__getattribute__(self, "_where")
        raise AttributeError(
            f"experiment={kind} doesn't read `{section}` (asked for {section}.{name}): name it in "
            "the class's `reads`, so that run keys know of it"
        )


@dataclass
class ExperimentKind:
    """Base. name: what results are filed under.

    reads: sections of the config that it uses, besides `experiment` and `seed`; run keys hash these
    alone, and no other can be read. label: what a report calls it; None: its name. steers: whether
    its result is a difference to the unsteered model; else it is an analysis.
    """

    name: str
    reads: ClassVar[frozenset[str]]
    label: ClassVar[str | None] = None
    steers: ClassVar[bool] = False

    def needs(self, exp: SteeringConfig) -> frozenset[str]:
        """Which of `NEEDS` a run with this config does."""
        return frozenset()

    def faults(self) -> list[str]:
        return []

    def conflicts(self, exp: SteeringConfig) -> list[str]:
        """What of the rest of the config it can't do with."""
        return []

    def called(self, exp: SteeringConfig) -> dict[str, Any]:
        """What a result is filed under: `method` (of an analysis its name), `label`, `control`;
        of one that steers also what a report asks of its method (`Method`), and whether it chose
        its layer."""
        return {"method": self.name, "label": self.label or self.name, "control": False}

    def features_at_once(self, exp: SteeringConfig) -> int:
        """Features that are chosen together; an SAE must have as many."""
        return 1

    @abstractmethod
    def run(self, workspace: Any) -> Result:
        """Do it, phase by phase (`workspace.timed`). workspace: a `RunWorkspace`."""
        raise NotImplementedError
