"""The tables below a sweep's main one, in their order."""

from __future__ import annotations

from crl_exp.report.comparison.rows import SweepComparison
from crl_exp.report.tables.analyses import analysis_tables
from crl_exp.report.tables.cells import FurtherTable
from crl_exp.report.tables.fit import fit_tables
from crl_exp.report.tables.groups import group_tables
from crl_exp.report.tables.ladder import ladder_tables
from crl_exp.report.tables.left_alone import left_alone_tables
from crl_exp.report.tables.pairs import pair_tables
from crl_exp.report.tables.quality import quality_tables
from crl_exp.report.tables.same_features import same_feature_tables


def further_tables(sweep: SweepComparison) -> list[FurtherTable]:
    """Those that have a line. Made once: the terminal, the page and two files show them."""
    if "further" not in sweep.made:
        sweep.made["further"] = _further(sweep)
    return sweep.made["further"]


def _further(sweep: SweepComparison) -> list[FurtherTable]:
    return [
        *analysis_tables(sweep), *group_tables(sweep), *ladder_tables(sweep), *pair_tables(sweep),
        *same_feature_tables(sweep), *quality_tables(sweep), *left_alone_tables(sweep),
        *fit_tables(sweep),
    ]  # fmt: skip
