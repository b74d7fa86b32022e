"""A figure is drawn again exactly where something that it is made of changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from crl_exp.report import drawn
from crl_exp.report.command import write_report
from crl_exp.report.drawn import KEPT
from crl_exp.report.parts import compare_parts
from crl_exp.runs.records import find_records
from tests.helpers.synthetic import config, finished_run

pytestmark = [pytest.mark.usefixtures("quick_figures"), pytest.mark.slow]


def sweep(folder: Path) -> Path:
    for seed, layer in ((0, 8), (1, 8), (0, 18)):
        finished_run(config(folder, layers=(layer,), seed=seed), 0.1 + seed / 100, steps=20)
    finished_run(config(folder, "corrsteer_s"), 0.05)
    return folder / "demo"


def report(folder: Path) -> dict[str, bytes]:
    """Every file of a report made now, by name."""
    write_report(compare_parts(find_records(folder)), folder / "report")
    return files_of(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    inside = folder / "report"
    return {
        str(path.relative_to(inside)): path.read_bytes()
        for path in inside.rglob("*") if path.is_file()
    }  # fmt: skip


def from_nothing(folder: Path, tmp_path: Path) -> dict[str, bytes]:
    """The report of a copy of the runs, without anything kept."""
    copy = tmp_path / "copy" / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("report", str(KEPT.parent)))
    return report(copy)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "report").glob("*.p[nd][gf]")}


def first_run(folder: Path) -> Path:
    return find_records(folder)[0].path


def edit_result(folder: Path) -> None:
    path = first_run(folder) / "result.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "delta": written["delta"] + 0.07}))


def edit_journal(folder: Path) -> None:
    path = next(iter(sorted(folder.glob("*/journal.jsonl"))))
    path.write_text(path.read_text().replace('"reward": 0.', '"reward": 0.1'))


def edit_a_figure(folder: Path) -> None:
    (folder / "report" / "by_layer.png").write_bytes(b"another picture")


def remove_a_figure(folder: Path) -> None:
    (folder / "report" / "training.pdf").unlink()


def add_a_run(folder: Path) -> None:
    finished_run(config(folder.parent, "random"), 0.0)


def test_of_an_unchanged_sweep_nothing_is_drawn(tmp_path):
    folder = sweep(tmp_path)
    first, drawn_at = report(folder), times(folder)
    assert {"by_layer.png", "training.pdf"} <= set(first)
    assert report(folder) == first == from_nothing(folder, tmp_path)
    assert times(folder) == drawn_at


@pytest.mark.parametrize(
    "change", [edit_result, edit_journal, edit_a_figure, remove_a_figure, add_a_run]
)
def test_after_a_change_the_report_is_that_of_no_cache(change, tmp_path):
    folder = sweep(tmp_path)
    before = report(folder)
    change(folder)
    after = report(folder)
    assert after == from_nothing(folder, tmp_path)
    assert (after == before) == (change in (edit_a_figure, remove_a_figure))


def test_another_version_of_the_code_draws_anew(tmp_path, monkeypatch):
    folder = sweep(tmp_path)
    report(folder)
    drawn_at = times(folder)
    monkeypatch.setattr(drawn, "code_digest", lambda: "another")
    report(folder)
    assert all(times(folder)[name] > at for name, at in drawn_at.items())


@pytest.mark.parametrize("text", ["{", "[]", '{"by_layer": 3}', '{"by_layer": {"files": 1}}', "\0"])
def test_a_damaged_cache_is_made_anew(text, tmp_path, caplog):
    folder = sweep(tmp_path)
    first = report(folder)
    kept = (folder / KEPT).read_text()
    (folder / KEPT).write_text(text)
    assert report(folder) == first
    assert ("is damaged" in caplog.text) == (not text.startswith('{"'))
    assert (folder / KEPT).read_text() == kept
    caplog.clear()
    report(folder)
    assert not caplog.text


def test_nothing_is_kept_of_runs_that_were_written_to_meanwhile(tmp_path, monkeypatch):
    """What was drawn may be of before or of after."""
    folder = sweep(tmp_path)
    parts = compare_parts(find_records(folder))
    save = drawn.Drawn.save

    def written_to_before(self) -> None:
        edit_result(folder)
        save(self)

    monkeypatch.setattr(drawn.Drawn, "save", written_to_before)
    write_report(parts, folder / "report")
    assert not (folder / KEPT).exists()


def test_a_folder_that_takes_no_cache_gets_its_report(tmp_path, caplog):
    folder = sweep(tmp_path)
    (folder / KEPT.parent).write_text("a file in the way")
    assert report(folder)
    assert "figures are drawn anew each time" in caplog.text
