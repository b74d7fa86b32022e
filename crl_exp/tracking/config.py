"""Where runs are compared: the config section, which imports nothing of what sends them."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

from crl_exp.config.errors import did_you_mean

TARGETS, MODES = ("mlflow", "wandb"), ("offline", "online")
# Sending takes at most this share of one core, and after faults is tried again at least so often.
SHARE, LONGEST_PAUSE_SECONDS = 0.1, 300.0


@dataclass
class TrackingConfig:
    """Where runs are compared.

    enabled: whether runs are sent anywhere.
    uri: MLflow's, `http(s)://HOST:PORT` or `sqlite:///FILE`; null: the file mlflow.db in
        output_dir.
    experiment: MLflow's name for what the sweeps are filed under.
    sync_seconds: a running run sends what is new so often, or less often where that would cost
        more than a tenth of one core.
    system_seconds: the load of processor, memory, disk and GPU is noted so often; null: never.
    target: `mlflow` or `wandb`; the keys below are wandb's.
    project: wandb's name for what the sweeps are filed under.
    entity: the user or team that the project is of; null: as wandb's login says.
    mode: `offline` writes what `wandb sync` uploads, `online` uploads it as the run goes on.
    """

    enabled: bool
    uri: str | None
    experiment: str
    sync_seconds: float
    system_seconds: float | None
    target: str = "mlflow"
    project: str = "crl_exp"
    entity: str | None = None
    mode: str = "offline"

    def faults(self) -> list[str]:
        found = [] if self.experiment else ["tracking.experiment is empty; give it a name"]
        for name in ("sync_seconds", "system_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                found.append(f"tracking.{name}={value:g}: must be positive, e.g. {name}=10")
        if self.uri is not None:
            found += [fault for fault in [uri_fault(self.uri)] if fault]
        if self.target == "wandb":
            return found + self._wandb_faults()
        if self.target == "mlflow":
            return found + self._not_wandbs()
        near = did_you_mean(self.target, TARGETS)
        names = ", ".join(TARGETS)
        return [*found, f"tracking.target={self.target}: must be one of {names}{near}"]

    def _wandb_faults(self) -> list[str]:
        found = []
        if self.uri is not None:
            found.append(
                "tracking.uri is MLflow's; with tracking=wandb set tracking.project and "
                "tracking.entity, and for a server of your own WANDB_BASE_URL in the environment"
            )
        if self.mode not in MODES:
            found.append(
                f"tracking.mode={self.mode}: must be one of {', '.join(MODES)}"
                f"{did_you_mean(self.mode, MODES)}"
            )
        for name in ("project", "entity"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[^/\\#?%:\x00-\x1f]{1,128}", value):
                found.append(
                    f"tracking.{name}={value!r}: must be a name of 1 to 128 characters, none of "
                    "them one of / \\ # ? % :"
                )
        return found + [fault for fault in [wandb_missing() if self.enabled else None] if fault]

    def _not_wandbs(self) -> list[str]:
        """Keys that would do nothing."""
        return [
            f"tracking.{name}={value} is wandb's; add tracking=wandb"
            for name, value, default in (
                ("project", self.project, "crl_exp"),
                ("entity", self.entity, None),
                ("mode", self.mode, "offline"),
            )
            if value != default
        ]


def wandb_missing() -> str | None:
    """What a person is told where wandb isn't installed; None: it is."""
    if importlib.util.find_spec("wandb") is not None:
        return None
    return (
        "tracking=wandb needs wandb, which isn't installed here: `pip install 'crl_exp[wandb]'`, "
        "or set tracking=mlflow or tracking=none"
    )


def uri_fault(uri: str) -> str | None:
    """What is wrong with a tracking URI as it is typed."""
    if not re.fullmatch(r"sqlite:///.+|https?://[^/\s].*", uri):
        return (
            f"tracking.uri={uri}: must be http://HOST:PORT, https://HOST, sqlite:///FILE, or null "
            "for a file in output_dir"
        )
    if re.match(r"https?://[^/]*:[^/]*@", uri):
        return (
            "tracking.uri holds a password, which would be written into every run directory; "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
        )
    return None
