"""The tables below a sweep's main one, in their order."""

from __future__ import annotations

from crl_exp.comparison import SweepComparison
from crl_exp.table_cells import FurtherTable
from crl_exp.table_fit import fit_tables
from crl_exp.table_groups import group_tables
from crl_exp.table_ladder import ladder_tables
from crl_exp.table_left_alone import left_alone_tables
from crl_exp.table_pairs import pair_tables
from crl_exp.table_quality import quality_tables


def further_tables(sweep: SweepComparison) -> list[FurtherTable]:
    """Those that have a line."""
    return [
        *group_tables(sweep), *ladder_tables(sweep), *pair_tables(sweep), *quality_tables(sweep),
        *left_alone_tables(sweep), *fit_tables(sweep),
    ]  # fmt: skip
