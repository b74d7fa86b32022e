"""Answers to read in a report's page: some that came right and some that went wrong.

They are drawn, not chosen: by a hash of the items' ids, so that the same ones come every time.
"""

from __future__ import annotations

from html import escape

from crl_exp.config.display import number
from crl_exp.report.comparison.added import added
from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.tables.cells import row_layers
from crl_exp.report.tables.notes import headline_row
from crl_exp.runs.answers import DRAWN_BY, WHICH, Answered, NoAnswersError, answers, drawn

SHOWN = 10
"""Of each kind."""
CHARACTERS = 600
"""Of a text; the rest is in `show`."""
TITLE = "Answers, unsteered and steered"


def read_row(sweep: SweepComparison) -> Row | None:
    """The row whose answers are shown: the headline's, else the one that does best on validation,
    a control where there is nothing else. None where nothing is steered."""
    able = [row for row in sweep.rows if not row.unsteered]
    return headline_row(sweep) or max(
        able, key=lambda row: (not row.control, row.validation), default=None
    )


def examples(sweep: SweepComparison) -> list[str]:
    """The section as HTML. Where the run has kept no answers it says why."""
    row = read_row(sweep)
    if row is None:
        return []
    run = row.runs[0]
    try:
        items = answers(run)
    except NoAnswersError as error:
        return [f"<h3>{TITLE}</h3>", f"<p class=note>None here: {escape(str(error))}.</p>"]
    every = {name: [one for one in items if WHICH[name](one)] for name in ("fixed", "broken")}
    some = {name: drawn(of, SHOWN) for name, of in every.items()}
    doses = added(run, "test", [one.item_id for of in some.values() for one in of])
    counts = " and ".join(
        f"{len(some[name])} of the {len(every[name]):,} whose reward {how}"
        for name, how in (("fixed", "rose"), ("broken", "fell"))
    )
    word = "layer" if row.single or row.alternatives else "layers"
    where = f", {word} {row_layers(row)}" if row.layers else ""
    why = "CRL's" if row is headline_row(sweep) else "of all"
    told = (
        f"{row.family}{where}, seed {run.config['seed']}: the row that did best on validation, "
        f"{why}. Of {len(items):,} test items {counts}, drawn by a hash of their ids with "
        f"seed {DRAWN_BY}: nobody chose them. Texts are cut at {CHARACTERS} characters; `python -m "
        f"crl_exp show {run.sweep}/{run.key} --fixed` has all of them, whole."
    )
    found = [f"<h3>{TITLE}</h3>", f"<p class=note>{escape(told)}</p>"]
    for name, title in (("fixed", "Came right"), ("broken", "Went wrong")):
        if some[name]:
            found.append(f"<details open><summary>{title} ({len(some[name])})</summary>")
            for one in some[name]:
                of = (doses or {}).get(one.item_id)
                found.append(_example(one, "; ".join(x.said() for x in of) if of else None))
            found.append("</details>")
    return found


def _example(one: Answered, added_: str | None) -> str:
    target = "" if one.target is None else f"<p class=said><b>target</b> {_text(one.target)}</p>"
    both = "".join(
        f"<div><b>{side}, reward {number(reward, 'g')}</b><p class=said>{_text(text)}</p></div>"
        for side, reward, text in (
            ("unsteered", one.reward_baseline, one.baseline),
            ("steered", one.reward_steered, one.steered),
        )
    )
    more = f"<p class=note>added: {escape(added_)}</p>" if added_ else ""
    return (
        f'<article><p class=said><b title="{escape(one.item_id)}">item {one.number}</b> '
        f"{_text(one.prompt)}</p>{target}<div class=both>{both}</div>{more}</article>"
    )


def _text(text: str) -> str:
    return escape(text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…")
