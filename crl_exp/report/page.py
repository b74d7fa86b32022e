"""The report as one HTML page that needs nothing else: style, script and figures are inside."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

from crl_exp.config.display import plain
from crl_exp.report.comparison.feature_credit import FeatureCredit
from crl_exp.report.comparison.rows import SweepComparison
from crl_exp.report.examples import examples
from crl_exp.report.parts import ReportPart, SweepParts
from crl_exp.report.tables.cells import (
    COLUMNS,
    FEATURE_COLUMNS,
    FEATURE_NOTE,
    OVERVIEW_NOTE,
    RUN_COLUMNS,
    FurtherTable,
    feature_cells,
    main_cells,
    matrix,
    overview_cells,
    overview_columns,
    run_cells,
    set_cells,
    set_columns,
    set_title,
    title,
    unfinished,
)
from crl_exp.report.tables.further import further_tables
from crl_exp.report.tables.notes import headline, notes
from crl_exp.runs.records import Record, typed_for

ASSETS = Path(__file__).parent / "assets"
FEATURES_SHOWN = 300
CAPTIONS = {
    "overview": "Difference to the unsteered model by task and method, with 95 % intervals; where "
    "a method was tried at several layers, at the one that did best on validation.",
    "ladder": "Difference to the unsteered model at each rung, with 95 % intervals; small dots are "
    "seeds. A rung differs from the one above it in what is named.",
    "by_layer": "Difference to the unsteered model by steered layer, with 95 % intervals; small "
    "dots are seeds.",
    "by_option": "Difference to the unsteered model by option, with 95 % intervals; small dots are "
    "seeds. Where several layers were tried: the one that did best on validation.",
    "by_labels": "Difference to the unsteered model by number of labelled training items, with "
    "95 % intervals, over draws of them where there are several. Validation's labels come on top. "
    "Where several layers were tried: the one that did best on validation.",
    "analyses": "What analyses found, by layer; shaded: 95 % intervals, of controls the range of "
    "all draws, where a figure has one (analyses.csv names which). Beside it the accuracy of "
    "methods that steer one layer (hollow: controls).",
    "heat_map": "Difference to the unsteered model in points; bold: Holm's p below 0.05. Grey: "
    "not run.",
    "training": "Reward while the policy was trained: on its rollouts (pale, mean over seeds) and "
    "on validation (mean and range over seeds).",
    "overlap": "Above or left: share of the distinct features that the policy used which stage 1 "
    "had found, beside what drawing at random from the allowed features would give. Below or "
    "right: share of its additions that were of such features, and of CorrSteer's own feature.",
    "diversity": "Distinct features that the policy used on the test items, and the entropy of "
    "their use. A dashed interval is over seeds alone: a run kept no interventions.parquet.",
    "sweeps": "Rows that are the same but for what sets the sweeps apart. Left: accuracy in each, "
    "with 95 % intervals; small dots are seeds. Right: the difference to the first sweep that has "
    "the row, paired item by item. Hollow: controls.",
    "correlation": "Correlation in stage 1 with the reward, or with what warmup.contrast names: of "
    "the features found there, and of those that the policy added.",
}


def page(parts: SweepParts, figures: dict[str, list[Path]], credits: dict[str, list]) -> str:
    """The page. figures, credits: by the folder of a part (`` for what is of all parts)."""
    body = [f"<h1>{escape(parts.name)}</h1>", f'<p class="about">{_about(parts)}</p>',
            *made_by(parts)]  # fmt: skip
    if parts.several:
        body += _overview(parts, figures.get("", []))
    for part in parts.parts:
        body += _section(part, figures[part.folder], credits[part.folder], parts.several)
    body += _not_finished(parts.unfinished)
    return document(parts.name, body)


def document(name: str, body: Sequence[str]) -> str:
    """A whole page of these elements."""
    style, script = (
        (ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _about(parts: SweepParts) -> str:
    """What was run, as it is known from the results."""
    runs = [run for part in parts.parts for row in part.sweep.rows for run in row.runs]
    runs += {one.run.key: one.run for part in parts.parts for one in part.sweep.analyses}.values()
    results = [run.result for run in runs if run.result is not None]
    commits = sorted({str(r["git_commit"])[:10] for r in results if r.get("git_commit")})
    models, saes = (
        ", ".join(sorted({r[key] for r in results if key in r})) for key in ("model", "sae")
    )
    told = f"{len(runs)} finished runs. Model {models}; SAEs {saes or 'none'}"
    scorers = ", ".join(sorted({r["scorer"] for r in results}))
    code = f"; code {', '.join(commits)}" if commits else ""
    return escape(f"{told}; scored by {scorers}{code}.")


def made_by(parts: SweepParts, lead: str = "") -> list[str]:
    """The command that made the sweep, as it was launched the last time. lead: before it."""
    some = parts.parts[0].sweep.first.path.parent
    asked = typed_for(some, launcher=True)
    # where MLflow is may hold a password, and changes no result
    typed = [shlex.quote(plain(x)) for x in asked if not x.lstrip("+").startswith("tracking.uri=")]
    if not asked:
        return [
            f'<p class="about">{escape(lead)}Its runs were started one by one; each config.yaml '
            "says what by.</p>"
        ]
    made = escape(" ".join(["python launch.py -m", *typed]))
    return [f'<p class="about">{escape(lead)}Launched last by <code>{made}</code></p>']


def _overview(parts: SweepParts, figures: list[Path]) -> list[str]:
    links = [f'<a href="#{part.folder}">{escape(part.title)}</a>' for part in parts.parts]
    head, lines = matrix(parts)
    return [
        f"<nav>{' '.join(links)}</nav>",
        "<p>Accuracy in % [95 %]; below it the difference to the unsteered model in points.</p>",
        table(head, lines),
        f"<p class=note>{escape(OVERVIEW_NOTE)}</p>",
        *map(figure, figures),
        "<details><summary>With seeds, layers and p-values</summary>",
        table(overview_columns(parts), overview_cells(parts), n_left=len(parts.keys) + 2),
        "</details>",
    ]


def _section(
    part: ReportPart, figures: list[Path], credits: list[FeatureCredit], several: bool
) -> list[str]:
    sweep = part.sweep
    best = headline(sweep)
    found = [
        f'<h2 id="{part.folder}">{escape(title(sweep))}</h2>',
        *([f"<p><strong>{escape(best)}</strong></p>"] if best else []),
        *(
            [table(COLUMNS, [main_cells(sweep, row) for row in sweep.rows], 2)]
            if sweep.rows
            else []
        ),
        *[f"<p class=note>{escape(line)}</p>" for line in notes(sweep)],
    ]
    if sweep.test_sets:
        cells = [set_cells(sweep, row) for row in sweep.rows]
        found += [f"<h3>{escape(set_title(sweep))}</h3>", table(set_columns(sweep), cells, 2)]
    found += further(further_tables(sweep))
    found += ['<div class="figures">', *map(figure, figures), "</div>"]
    found += examples(sweep)
    found += _features(credits) + _runs(sweep) + _not_finished(sweep.unfinished)
    return ["<section>", *found, "</section>"]


def further(tables: Sequence[FurtherTable]) -> list[str]:
    found = []
    for more in tables:
        found += [f"<h3>{escape(more.title)}</h3>", table(more.columns, more.lines, more.n_left)]
        found += [f"<p class=note>{escape(line)}</p>" for line in more.notes]
    return found


def _features(credits: list[FeatureCredit]) -> list[str]:
    if not credits:
        return []
    shown = credits[:FEATURES_SHOWN]
    more = len(credits) - len(shown)
    rest = [f"<p class=note>{more:,} more are in features.csv.</p>"] if more > 0 else []
    links = {(i, 2): c.link for i, c in enumerate(shown) if c.link}
    return [
        f"<details open><summary>Features and the items they were added to ({len(credits)})"
        "</summary>",
        f"<p class=note>{escape(FEATURE_NOTE)}</p>",
        '<div class="scroll">',
        table(FEATURE_COLUMNS, [feature_cells(c) for c in shown], n_left=2, links=links),
        "</div>", *rest, "</details>",
    ]  # fmt: skip


def _runs(sweep: SweepComparison) -> list[str]:
    runs = [run_cells(row, run) for row in sweep.rows for run in row.runs]
    if not runs:
        return []
    return [f"<details><summary>Runs ({len(runs)})</summary>", table(RUN_COLUMNS, runs, 2),
            "</details>"]  # fmt: skip


def _not_finished(runs: Sequence[Record]) -> list[str]:
    lines = [f"<li>{escape(line)}</li>" for line in unfinished(runs)]
    return [f"<h3>Not finished ({len(lines)})</h3><ul>{''.join(lines)}</ul>"] if lines else []


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], n_left: int = 1,
    links: dict[tuple[int, int], str] | None = None,
) -> str:  # fmt: skip
    """A table whose heads sort it. n_left: columns of text. links: by row and column."""

    def cell(i: int, j: int, text: str) -> str:
        shown = escape(text).replace("\n", "<br>")
        link = (links or {}).get((i, j))
        if link:
            shown = f'<a href="{escape(link)}" rel="noopener">{shown}</a>'
        return f"<td{'' if j < n_left else ' class=n'}>{shown}</td>"

    heads = [
        f"<th{'' if j < n_left else ' class=n'}><button>{escape(column)}</button></th>"
        for j, column in enumerate(columns)
    ]
    lines = [
        "<tr>" + "".join(cell(i, j, text) for j, text in enumerate(row)) + "</tr>"
        for i, row in enumerate(rows)
    ]
    return (
        '<div class="wide"><table class="sortable"><thead><tr>'
        + "".join(heads) + "</tr></thead>\n<tbody>" + "\n".join(lines) + "</tbody></table></div>"
    )  # fmt: skip


def figure(path: Path) -> str:
    """A PNG inside the page, as wide as in print."""
    from PIL import Image

    data = path.read_bytes()
    with Image.open(path) as image:
        width = round(image.width / 300 * 120)  # 300 dots an inch, shown at 120
    caption = CAPTIONS[path.stem]
    return (
        f'<figure style="max-width:{width}px"><img width="{width}" alt="{escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
