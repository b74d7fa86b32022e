"""Answers in a report's page: drawn, not chosen, and shown as text."""

from __future__ import annotations

import re

import pytest

from crl_exp.report.command import main, next_lines
from crl_exp.report.comparison.rows import SweepComparison, compare_runs
from crl_exp.report.examples import examples, read_row
from crl_exp.runs.items import ItemTexts, items_table, write_items
from crl_exp.runs.records import find_records
from tests.config.test_foreign_text import CONTROLS, TEXTS
from tests.helpers.synthetic import config, run_of_items


def answered(folder, fixed: int, broken: int, method="corrsteer_s", validation=0.1, n=100, **more):
    """A finished run: the first items came right, the last went wrong."""
    was = [0.0] * fixed + [1.0] * (n - fixed)
    now = [1.0] * (n - broken) + [0.0] * broken
    run = run_of_items(config(folder, method, **more), was, now, validation)
    ids = [f"item{i:04d}" for i in range(n)]
    texts = [f"{method} {i} {TEXTS[i % len(TEXTS)]}" for i in range(n)]
    kept = ItemTexts(texts, [f"t{i}" for i in range(n)], ["before"] * n, texts)
    write_items(run.path, [items_table("test", ids, was, now, [True] * n, [""] * n, kept)])
    return run


def compared(folder) -> SweepComparison:
    return compare_runs(find_records(folder / "demo"))


def numbers(html: str) -> list[int]:
    return [int(one) for one in re.findall(r">item (\d+)</b>", html)]


def test_ten_that_came_right_and_ten_that_went_wrong_are_drawn(tmp_path):
    answered(tmp_path, 40, 30)
    html = "\n".join(examples(compared(tmp_path)))
    right, wrong = html.split("Went wrong (10)")
    assert "Came right (10)" in right and html.count("<article>") == 20
    assert max(numbers(right)) <= 40 and min(numbers(wrong)) > 70
    assert numbers(right) != list(range(1, 11)) and len(set(numbers(html))) == 20
    assert "10 of the 40 whose reward rose and 10 of the 30 whose reward fell, drawn by" in html
    assert html == "\n".join(examples(compared(tmp_path))), "the same ones every time"


def test_where_there_are_fewer_all_are_shown(tmp_path):
    answered(tmp_path, 3, 0)
    html = "\n".join(examples(compared(tmp_path)))
    assert numbers(html) == [1, 2, 3] and "Went wrong" not in html
    assert "3 of the 3 whose reward rose and 0 of the 0" in html


def test_they_are_of_the_row_that_validation_chose(tmp_path):
    answered(tmp_path, 4, 4, "corrsteer_s", 0.2)
    answered(tmp_path, 4, 4, "lora", 0.1)
    answered(tmp_path, 4, 4, "random", 0.4)
    html = "\n".join(examples(compared(tmp_path)))
    assert "corrsteer_s 1 " in html and "lora" not in html and "random" not in html
    answered(tmp_path, 4, 4, "crl", 0.05)  # the headline's
    assert "crl 1 " in "\n".join(examples(compared(tmp_path)))


def test_a_sweep_of_the_unsteered_model_has_none(tmp_path):
    answered(tmp_path, 0, 0, "none")
    assert examples(compared(tmp_path)) == [] and read_row(compared(tmp_path)) is None


@pytest.mark.usefixtures("quick_reports")
def test_the_page_shows_them_as_text_and_tables_have_none(tmp_path, capsys):
    run = answered(tmp_path, 40, 30)
    assert main([str(tmp_path / "demo")]) == 0
    folder = tmp_path / "demo" / "report"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 20 and page.count("<script>") == 1
    assert "<img src=x" not in page and not CONTROLS & set(page)
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    for name in ("table.md", "table.tex", "table.csv"):
        assert "before" not in (folder / name).read_text(encoding="utf-8")
    shown = f"python -m crl_exp show {tmp_path / 'demo' / run.key} --fixed"
    assert shown in capsys.readouterr().out
    assert main([str(tmp_path / "demo")]) == 0
    assert (folder / "report.html").read_text(encoding="utf-8") == page


@pytest.mark.usefixtures("quick_reports")
def test_runs_of_before_have_a_line_that_says_why(tmp_path):
    run_of_items(config(tmp_path), [0, 1], [1, 1])
    assert main([str(tmp_path / "demo")]) == 0
    page = (tmp_path / "demo" / "report" / "report.html").read_text(encoding="utf-8")
    assert "it was run before answers were kept" in page and "<article>" not in page
    assert not any(" show " in x for x in next_lines(compared(tmp_path), tmp_path / "demo"))
