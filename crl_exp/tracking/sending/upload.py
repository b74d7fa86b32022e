"""Run directories to one MLflow, as often as you like, without duplicates.

What was sent is kept beside what it was sent from (`mlflow_runs`). A point that was sent and not
noted is not sent again: MLflow is asked for the last step it has, and drops equal points.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crl_exp.config.errors import UserError
from crl_exp.runs.records import Record
from crl_exp.tracking.sending.content import (
    ARTIFACTS,
    BY_LAYER,
    SWEEP_ARTIFACTS,
    UNFINISHED,
    WHOLE_PARAMS,
    Point,
    code_tags,
    data_set,
    files,
    final_points,
    parameters,
    points,
    read_json,
    tags,
)
from crl_exp.tracking.sending.mlflow_runs import (
    Runs,
    code_of_the_last,
    ended,
    status_of,
    status_of_all,
)
from crl_exp.tracking.sending.outbox import Outbox
from crl_exp.tracking.sending.requests import cut, requests_of
from crl_exp.tracking.sending.samples import send_samples
from crl_exp.tracking.sending.sent import Reading, Sent, digest

if TYPE_CHECKING:
    from mlflow.entities import Run


class ArtifactError(OSError):
    """MLflow's artifact store didn't take a file."""


class Uploader:
    """Sends run directories to one MLflow."""

    def __init__(self, runs: Runs):
        self.runs, self.client = runs, runs.client

    # --- a run ---

    def announce(self, record: Record, parent: str, code: dict[str, Any]) -> None:
        """Make the run of a run directory that waits to be started. Two requests."""
        with self.runs.noted(record.path) as sent:
            run = self.runs.child(record, sent, parent, cut(tags(record, code)))
            self._status(record, run)

    def send(
        self, record: Record, reading: Reading | None = None, at_most: float = float("inf")
    ) -> bool:
        """Bring MLflow up to date with the run directory as it is now.

        reading: how far it was read by an earlier call with the same record's directory.
        Returns False where more than `at_most` points were there and some are left.
        """
        parent = self.parent(record.path.parent, read_json(record.path / "code.json"))
        over = status_of(record) not in UNFINISHED
        with self.runs.noted(record.path) as sent:
            run = self.runs.child(record, sent, parent, cut(tags(record)))
            if not over:
                self._status(record, run)
            whole = self._texts_and_points(record, sent, run, reading or Reading(), at_most)
            self.artifacts(record.path, sent, (*ARTIFACTS, "status.json") if over else ARTIFACTS)
            self._status(record, run)
            send_samples(record, sent, run, self.client, _stored)
        return whole

    def _texts_and_points(
        self, record: Record, sent: Sent, run: Run, reading: Reading, at_most: float
    ) -> bool:
        """Returns False where some points are left."""
        box = Outbox(self.client, sent)
        try:
            self._input(record, sent, box)
            self._texts(record, sent, run, box)
            whole = self._journals(record, sent, run, box, reading, at_most)
            self._result(record, sent, run, box)
            box.flush()
        except UserError:  # a damaged file; what came before it is sent
            reading.tails.clear()
            box.flush()
            raise
        except BaseException:
            reading.tails.clear()  # what was read, and didn't come through, is read again
            raise
        return whole

    def _texts(self, record: Record, sent: Sent, run: Run, box: Outbox) -> None:
        run_id = sent.record["run_id"]
        found = tags(record)
        if sent.record.get("error") and "error" not in found:
            found["error"] = ""  # of an earlier attempt
        given: dict[str, str] = {}
        n_params = sent.record.get("params")
        is_known = sent.record.get("tags") == digest(found)
        if n_params and is_known:
            return
        if not n_params:
            params = parameters(record.config)
            if params.whole:
                _stored(WHOLE_PARAMS, self.client.log_dict, run_id, params.whole, WHOLE_PARAMS)
            given, n_params = params.given, len(params.given)
        # A run that was made just now was made with them.
        is_known = is_known or (
            "tags" not in sent.record and cut(found).items() <= run.data.tags.items()
        )
        noted = {"tags": digest(found), "error": bool(found.get("error")), "params": n_params}
        box.put(
            lambda: sent.record.update(noted), tags={} if is_known else cut(found), params=given
        )

    def _status(self, record: Record, run: Run) -> None:
        self.runs.set_status(run.info.run_id, status_of(record), ended(record))

    def _input(self, record: Record, sent: Sent, box: Outbox) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = data_set(record)
        if data is None or sent.record.get("data") == data.digest:
            return
        made = Dataset(data.name, data.digest, data.source_type, data.source, None, data.profile)
        context = InputTag("mlflow.data.context", "train, validation, test")
        self.client.log_inputs(sent.record["run_id"], [DatasetInput(made, [context])])
        box.put(lambda: sent.record.update(data=data.digest))

    # --- points ---

    def _journals(
        self, record: Record, sent: Sent, run: Run, box: Outbox, reading: Reading, at_most: float
    ) -> bool:
        """Points later than the last one sent of their name.

        Where a resumed run cut its journal back, it goes over the same steps again; they are sent
        once.
        """
        if "last_step" not in sent.record:  # a new run; the one before was deleted there, say
            reading.tails.clear()
        noted: dict[str, int] = sent.record.setdefault("last_step", {})
        last = dict(noted)
        for metric in run.data._metric_objs:  # what came through, noted or not
            if not metric.key.startswith(BY_LAYER):
                last[metric.key] = max(metric.step, last.get(metric.key, -1))
        n_sent = 0
        for name, prefix in (("journal.jsonl", ""), ("system.jsonl", "system/")):
            for lines in reading.parts(record.path / name):
                found = points(lines, prefix)
                by_layer = [p for p in found if p.name.startswith(BY_LAYER)]
                others = [p for p in found if not p.name.startswith(BY_LAYER)]
                new = [p for p in others if p.step > last.get(p.name, -1)]
                if new:
                    steps = {p.name: p.step for p in new}
                    last |= steps
                    box.put(lambda steps=steps: noted.update(steps), new)
                n_sent += len(new) + self._any_order(by_layer, sent, run, box)
                if n_sent > at_most:
                    return False
        return True

    def _result(self, record: Record, sent: Sent, run: Run, box: Outbox) -> None:
        if record.result is None:
            return
        time_ms = int((record.path / "result.json").stat().st_mtime * 1000)
        found = final_points(record.result, time_ms)
        # Of the points, not of the result: a version that knows more of them sends those.
        now = digest([[point.name, point.step, point.value] for point in found])
        if sent.record.get("final_points") == now:
            return
        if sent.record.get("result") is not None and "final_points" not in sent.record:
            found = [
                p for p in found if p.name.startswith(BY_LAYER)
            ]  # an older version sent the rest
        self._any_order(found, sent, run, box)
        new = {"result": digest(record.result), "final_points": now}
        box.put(lambda: sent.record.update(new))

    def _any_order(self, found: list[Point], sent: Sent, run: Run, box: Outbox) -> int:
        """Put in points whose steps come in any order (layers), each once; returns how many.

        MLflow has only the highest step of a metric at hand: of those that it may have and that
        weren't noted, it is asked for every step.
        """
        run_id = sent.record["run_id"]
        may_have = {metric.key for metric in run.data._metric_objs}
        steps: dict[str, list[int]] = sent.record.setdefault("steps", {})
        there = {name: set(known) for name, known in steps.items()}
        for name, put in box.steps.items():
            there.setdefault(name, set()).update(put)
        new = [p for p in found if p.step not in there.get(p.name, ())]
        for name in may_have & {p.name for p in new}:
            history = self.client.get_metric_history(run_id, name)
            there.setdefault(name, set()).update(metric.step for metric in history)
        new = [p for p in new if p.step not in there.get(p.name, ())]
        if new:
            box.put_steps(new)
        return len(new)

    def _log(self, run_id: str, new: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        if new:
            made = [Metric(p.name, p.value, p.time_ms, p.step) for p in new]
            self.client.log_batch(run_id, metrics=made)

    # --- files ---

    def artifacts(self, folder: Path, sent: Sent, patterns: tuple[str, ...]) -> int:
        """Send files that MLflow hasn't got as they are now; returns how many it was sent."""
        count = 0
        known: dict[str, str] = sent.record.setdefault("artifacts", {})
        stats: dict[str, list[int]] = sent.record.setdefault("artifact_stats", {})
        before = dict(stats)
        try:
            for path, inside in files(folder, patterns):
                name = str(path.relative_to(folder))
                stat = [path.stat().st_size, path.stat().st_mtime_ns]
                if stats.get(name) == stat:
                    continue
                now = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                if known.get(name) != now:
                    run_id = sent.record["run_id"]
                    _stored(name, self.client.log_artifact, run_id, str(path), inside)
                    count += 1
                known[name], stats[name] = now, stat
        finally:
            if stats != before:  # once for all of them; one sent twice is the same file
                sent.save()
        return count

    # --- a sweep ---

    def parent(self, sweep: Path, code: dict[str, Any] | None = None) -> str:
        """Id of the sweep's run. code: as in code.json, for its tags where it is made now."""
        with self.runs.noted(sweep) as sent:
            return self.runs.parent(sent, cut(code_tags(code or {})))

    def send_sweep(self, sweep: Path) -> None:
        """The parent's status, tags and files, such as the code's changes and the report."""
        self.runs.describe()
        with self.runs.noted(sweep) as sent:
            run_id = self.runs.parent(sent, {})
            self.artifacts(sweep, sent, SWEEP_ARTIFACTS)
            records = [Record(path.parent) for path in sweep.glob("*/config.yaml")]
            self._code(sent, code_tags(code_of_the_last(records)))
            self._layers(sent, records)
            now = status_of_all({status_of(record) for record in records})
            self.runs.set_status(run_id, now, max(map(ended, records), default=time.time()))

    def _layers(self, sent: Sent, records: list[Record]) -> None:
        """Series over the layers that the sweep's runs steer one at a time (`sweep_layers`). A mean
        that another seed has changed is sent again at the same layer: MLflow shows the last."""
        from crl_exp.tracking.sending.sweep_layers import (
            sweep_points,  # scipy: no start-up waits for it
        )

        finished = sorted(record.key for record in records if record.result is not None)
        if sent.record.get("layers_of") == digest(finished):
            return
        known: dict[str, float] = sent.record.setdefault("layer_values", {})
        found = {f"{p.name} @ {p.step}": p for p in sweep_points(records)}
        new = [point for name, point in found.items() if known.get(name) != point.value]
        for part in requests_of(new):
            self._log(sent.record["run_id"], part)
        known |= {name: point.value for name, point in found.items()}
        sent.record["layers_of"] = digest(finished)
        sent.save()

    def _code(self, sent: Sent, found: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        if found and sent.record.get("tags") != digest(found):
            tags = [RunTag(key, value) for key, value in cut(found).items()]
            self.client.log_batch(sent.record["run_id"], tags=tags)
            sent.record["tags"] = digest(found)
            sent.save()


def _stored(name: str, call: Callable[..., Any], *arguments: Any) -> None:
    try:
        call(*arguments)
    except Exception as error:  # each artifact store raises its own kinds
        raise ArtifactError(f"its artifact store didn't take {name}: {error}") from error
