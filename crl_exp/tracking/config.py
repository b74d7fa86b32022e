"""Where runs are compared: the config section, which imports nothing of what sends them."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass
class TrackingConfig:
    """Where runs are compared.

    enabled: whether runs are sent to MLflow.
    uri: `http(s)://HOST:PORT` or `sqlite:///FILE`; null: the file mlflow.db in output_dir.
    experiment: MLflow's name for what the sweeps are filed under.
    sync_seconds: a running run sends what is new so often, or less often where that would cost
        more than a tenth of one core.
    system_seconds: the load of processor, memory, disk and GPU is noted so often; null: never.
    """

    enabled: bool
    uri: str | None
    experiment: str
    sync_seconds: float
    system_seconds: float | None

    def faults(self) -> list[str]:
        found = [] if self.experiment else ["tracking.experiment is empty; give it a name"]
        for name in ("sync_seconds", "system_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                found.append(f"tracking.{name}={value:g}: must be positive, e.g. {name}=10")
        if self.uri is not None:
            found += [fault for fault in [uri_fault(self.uri)] if fault]
        return found


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
