"""A sweep's report in MLflow: artifacts of the sweep's parent run, each sent once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crl_exp.tracking.sending.client import outside_faults, plain
from crl_exp.tracking.sending.sent import SENT
from crl_exp.tracking.sending.target import MlflowTarget

log = logging.getLogger(__name__)
REPORT = "report"


def attach_report(folder: Path, config: Mapping[str, Any]) -> int | None:
    """Log the files of `folder`/report to the parent run of the sweep in `folder`.

    config: a run's section `tracking`. A file that MLflow has as it is now isn't sent again.
    Returns how many were sent; None where runs aren't sent to MLflow, and where MLflow doesn't have
    the sweep or doesn't take them, which is warned of: the report itself is on disk.
    """
    if not config["enabled"] or config.get("target", "mlflow") != "mlflow":
        return None
    folder = folder.absolute()
    place = MlflowTarget(config["uri"], config["experiment"], folder.parent)
    try:
        # Where nothing was ever sent, asking would only make an empty database.
        if (folder / SENT).exists():
            uploader = place.uploader(None)
            with uploader.runs.noted(folder) as sent:
                if "run_id" in sent.record:
                    return uploader.artifacts(folder, sent, (f"{REPORT}/**/*",))
        log.warning(
            "the report is not in MLflow: %s has no run for this sweep yet. `python -m crl_exp "
            "sync %s` makes it and sends the report", place.resolved, folder,
        )  # fmt: skip
        return None
    except outside_faults() as error:
        log.warning(
            "MLflow did not take the report (tracking.uri=%s): %s. It is in %s; make it again once "
            "MLflow is right", place.resolved, plain(error), folder / REPORT,
        )  # fmt: skip
        return None
