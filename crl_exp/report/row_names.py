"""How a run or a row of a report is named on the command line, and found."""

from __future__ import annotations

from pathlib import Path

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.report.comparison.rows import Row
from crl_exp.report.labels import labels
from crl_exp.report.parts import ReportPart, compare_parts
from crl_exp.report.tables.cells import row_layers
from crl_exp.runs.records import Record, find_records, find_sweep


def find_rows(name: str, output_dir: Path) -> tuple[str, Row]:
    """The row that `name` means, and what it is called. A single run is a row of one.

    Raises `UserError` where there is none, or several, with the nearest names.
    """
    record = _run(name, output_dir)
    if record is not None:
        if record.result is None:
            raise UserError(f"{name} is {record.state}: it has no result yet")
        return _named_run(record)
    sweep, colon, wanted = name.partition(":")
    if not colon:
        raise _unknown(name, output_dir)
    return _row(sweep, wanted.strip(), output_dir)


def _run(name: str, output_dir: Path) -> Record | None:
    places = [Path(name), output_dir / name, *sorted(output_dir.glob(f"*/{Path(name).name}"))]
    if "/" in name:
        places = places[:2]
    found = {p.absolute() for p in places if (p / "config.yaml").is_file()}
    if len(found) > 1:
        told = ", ".join(str(path) for path in sorted(found))
        raise UserError(f"{name} is in several sweeps: {told}; give SWEEP/RUN_KEY")
    return Record(found.pop()) if found else None


def _named_run(record: Record) -> tuple[str, Row]:
    label = labels([record])[record.key]
    shuffled = bool(record.config["task"].get("shuffle_labels"))
    assert record.result is not None
    row = Row(label, record.result["method"], shuffled, tuple(record.layers or ()), (record,))
    return f"{record.sweep}/{record.key}, {label.text} @ {row_layers(row)}", row


def _unknown(name: str, output_dir: Path) -> UserError:
    runs = [path.parent for path in output_dir.glob("*/*/config.yaml")]
    known = {path.name for path in runs} | {f"{p.parent.name}/{p.name}" for p in runs}
    sweeps = sorted({path.parent.name for path in runs})
    listed = f"; sweeps in {output_dir}: {', '.join(sweeps)}" if sweeps else ""
    return UserError(
        f"no run {name!r} in {output_dir}{did_you_mean(name, known)}{listed}. A row of a report is "
        "SWEEP:METHOD@LAYERS"
    )


def _row(sweep: str, wanted: str, output_dir: Path) -> tuple[str, Row]:
    parts = compare_parts(find_records(find_sweep(sweep, output_dir)))
    rows = [(part, row) for part in parts.parts for row in part.sweep.rows]
    method, at, layers = wanted.rpartition("@") if "@" in wanted else (wanted, "", "")
    named = [(p, r) for p, r in rows if _is(p, r, method.strip())]
    found = [(p, r) for p, r in named if not at or _layers(layers) == _layers(row_layers(r))
             or _layers(layers) == _layers(",".join(map(str, r.layers)))]  # fmt: skip
    if not at and len(found) > 1 and len({id(part) for part, _ in found}) == 1:
        found = [max(found, key=lambda one: one[1].validation)]
    if len(found) == 1:
        part, row = found[0]
        return f"{sweep}:{address(part, row)}", row
    known = [address(part, row) for part, row in rows]
    if named and at and not found:
        known = [address(part, row) for part, row in named]
    what = f"several rows of {sweep} are {wanted!r}" if found else f"{sweep} has no row {wanted!r}"
    raise UserError(
        f"{what}{did_you_mean(wanted, known)}\nits rows:\n"
        + "\n".join(f"  {sweep}:{one}" for one in known)
    )


def _is(part: ReportPart, row: Row, wanted: str) -> bool:
    """Whether a row goes by this name: as the table names it, or by the config's `method.name`."""
    words = wanted.lower()
    names = {row.family.lower(), f"{part.title} {row.family}".strip().lower()}
    if not row.shuffled:
        names.add(f"{row.method} {row.label.options}".strip().lower())
    return words in names


def _layers(text: str) -> str:
    """`8,12` as the tables print it (`8, 12`, `8…22 (5)`, `12 or 18`) without its spaces."""
    return text.replace(" or ", ",").replace(" ", "").replace("–", "")


def address(part: ReportPart, row: Row) -> str:
    layers = ",".join(map(str, row.layers))
    family = f"{part.title} {row.family}".strip()
    return f"{family}@{layers}" if layers and not row.unsteered else family
