"""Text that others wrote, and terminals that can't show it: shown, not obeyed, and never lost."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crl_exp.__main__ import main
from crl_exp.config.display import csv_cell, plain
from crl_exp.report.command import write_report
from crl_exp.report.figures.style import style
from crl_exp.report.parts import compare_parts
from crl_exp.report.tables.csv import as_csv
from crl_exp.runs.records import Record, find_records
from crl_exp.tracking.sending.content import parameters, tags
from tests.helpers.synthetic import config, finished_run
from tests.helpers.tiny_run import ROOT

TEXTS = (
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[/bold][red]x[/]",
    "\x1b[2J\x1b]0;title\x07", "over\rwritten", "nul\x00", "half \ud800", "=HYPERLINK(\"http://x\")",
    "@SUM(A1)", "\u202etxt.exe", "C1 \x9b31m", "line\u2028end", "| a | b |", "$x_1 \\input{y}",
    "$\\no {such}$ costs",
)  # fmt: skip
CONTROLS = set(map(chr, [*range(9), *range(11, 32), 127, *range(128, 160), 0x2028, 0x202E, 0xD800]))


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_shown_as_text(text):
    shown = plain(text)
    assert not CONTROLS & set(shown) and shown.encode()
    assert plain(shown) == shown
    cell = list(csv.reader(io.StringIO(as_csv(["head"], [[text]]))))[1][0]
    assert cell[0] not in "=@+-\t\r" and shown in cell


def test_numbers_are_no_formulas():
    given = ["-0.3", "+1e-5", -0.3, 12, None, True, "plain", "-x", float("nan")]
    assert list(map(csv_cell, given)) == [*given[:7], "'-x", ""]


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Runs whose options, errors and warnings hold such texts."""
    for i, text in enumerate(TEXTS):
        finished_run(
            config(tmp_path, more={"fusion.name": text.replace("\ud800", "")}, seed=i), 0.1
        )
    failed = finished_run(config(tmp_path, seed=99), 0.1)
    failed.result_path.unlink()
    failed.set_status("failed", error="".join(TEXTS))
    return failed.path.parent


def test_a_report_holds_nothing_that_is_obeyed(sweep, quick_reports):
    write_report(compare_parts(find_records(sweep)), sweep / "report")
    for path in (sweep / "report").glob("*.*"):
        if path.suffix not in (".png", ".pdf"):
            assert not CONTROLS & set(path.read_text(encoding="utf-8")), path
    page = (sweep / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("<script>") == 1 and "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page
    table = (sweep / "report" / "table.md").read_text(encoding="utf-8")
    assert "<script>" not in table and "<img" not in table


def test_no_escape_reaches_the_terminal_and_what_it_lacks_is_lost_there_alone(
    sweep, quick_reports, monkeypatch
):
    for command in ("report", "status"):
        terminal = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
            assert main([command, str(sweep)]) == 0
            sys.stdout.flush()
            said = terminal.getvalue().decode("ascii")  # before the stream goes and closes it
        assert not CONTROLS & set(said) and len(said) > 100, command
        assert "[red]" in said or command == "status"
    assert "Δ" in (sweep / "report" / "table.md").read_text(encoding="utf-8")
    assert "Δ" in (sweep / "report" / "report.html").read_text(encoding="utf-8")


def test_files_come_before_the_terminal(sweep, quick_reports, monkeypatch):
    """Whatever the terminal does."""

    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("crl_exp.report.console.terminal.print_parts", gone)
    with pytest.raises(BrokenPipeError):
        main(["report", str(sweep)])
    assert (sweep / "report" / "report.html").exists()


def test_mlflow_is_given_no_text_that_a_database_refuses(sweep):
    record = Record(next(sweep.glob("*/config.yaml")).parent)
    record.config["model"]["name"] = "".join(TEXTS)
    for text in [*tags(record).values(), *parameters(record.config).given.values()]:
        text.encode()  # it can be written at all
        assert not CONTROLS & set(text)


@pytest.mark.slow
def test_a_machine_without_utf8_writes_whole_files(tmp_path):
    """The C locale, with Python's ways around it off."""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
           "PYTHONIOENCODING": "ascii"}  # fmt: skip
    out = tmp_path / "outputs"
    run = ["launch.py", "+debug=tiny", f"output_dir={out}", "sweep_name=s", "method=corrsteer_s"]
    module = ["-m", "crl_exp"]
    for command in (run, [*module, "status", str(out / "s")], [*module, "report", str(out / "s")],
                    [*module, "options", "--check"]):  # fmt: skip
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=env
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "Δ" in (out / "s" / "report" / "report.html").read_text(encoding="utf-8")


def test_dollars_in_a_label_are_drawn_and_set_no_formula():
    with style():
        from matplotlib import pyplot

        figure = pyplot.figure()
        widths = [figure.text(0, 0, text).get_window_extent().width for text in ("$5_a$", "5_a")]
        pyplot.close(figure)
    assert widths[0] > 1.2 * widths[1]
