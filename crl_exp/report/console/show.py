"""`python -m crl_exp show RUN`: what a run was asked, and its answers beside the unsteered ones.

RUN is named as `compare` names it: a run, or a row of a report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from crl_exp.config.display import number, plain
from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.report.comparison.added import Added, added
from crl_exp.report.row_names import find_rows
from crl_exp.runs.answers import WHICH, Answered, answers
from crl_exp.runs.records import Record

SHOWN = 10
CHARACTERS = 700
"""Of a text where several items are shown; a single one is shown whole."""
WIDTH = 100
"""Columns where there is no terminal."""
WHAT = {
    "fixed": "whose reward rose", "broken": "whose reward fell",
    "changed": "whose answer's tokens differ from the unsteered one's",
}  # fmt: skip


def the_item(items: Sequence[Answered], wanted: str) -> Answered:
    """The item of this id (or the beginning of one) or number.

    Raises `UserError` with what there is where there is none, or several.
    """
    by_id = {one.item_id: one for one in items}
    if wanted in by_id:
        return by_id[wanted]
    if wanted.lstrip("-").isdecimal() and len(wanted) <= len(str(len(items))):
        at = int(wanted)
        if not 1 <= at <= len(items):
            nearest = 1 if at < 1 else len(items)
            raise UserError(
                f"--item {wanted}: there are {len(items):,} items, 1 to {len(items)}; "
                f"the nearest is {nearest}"
            )
        return items[at - 1]
    begun = [one for one in items if wanted and one.item_id.startswith(wanted)]
    if len(begun) == 1:
        return begun[0]
    if begun:
        listed = ", ".join(one.item_id for one in begun[:5])
        raise UserError(
            f"--item {wanted}: the ids of {len(begun)} items begin so, such as {listed}; give more "
            "of it"
        )
    raise UserError(
        f"--item {wanted}: no item has this id{did_you_mean(wanted, list(by_id))}; items are "
        f"numbered 1 to {len(items)}, and their ids are in items.parquet"
    )


def chosen(items: Sequence[Answered], which: str | None) -> tuple[list[Answered], str]:
    """The items asked for, and in words how many of them there are."""
    if which is None:
        return list(items), f"{len(items):,} items"
    found = [one for one in items if WHICH[which](one)]
    return found, f"{len(found):,} of {len(items):,} items {WHAT[which]}"


def shown(
    one: Answered, n: int, of: list[Added] | None, sides: tuple[str, str], most: int | None
) -> Group:
    """An item as a terminal shows it. of: what was added; None: not known. sides: what the two
    answers are called. most: characters of a text; None: all."""
    named = f"item {one.number} of {n:,}   {one.item_id}"
    table = Table(
        box=None, expand=True, padding=(0, 2, 0, 0), show_header=True, header_style="bold"
    )
    for side, reward in zip(sides, (one.reward_baseline, one.reward_steered), strict=True):
        table.add_column(Text(f"{side}, reward {number(reward, 'g')}"), ratio=1, overflow="fold")
    table.add_row(*(_text(text, most) for text in (one.baseline, one.steered)))
    parts = [
        Text(plain(named + (f"   group {one.group}" if one.group else "")), style="bold cyan"),
        _labelled("asked", one.prompt, most),
        _labelled("target", "– (the task has none)" if one.target is None else one.target, most),
        table,
    ]
    if of is not None:
        said = "; ".join(layer.said() for layer in of) or "nothing"
        parts.append(_labelled("added", said, None))
    return Group(*parts, Text(""))


def _labelled(label: str, text: str, most: int | None) -> Text:
    return Text.assemble((f"{label}: ", "dim"), _text(text, most))


def _text(text: str, most: int | None) -> Text:
    """Foreign text: nothing in it is obeyed."""
    if most is not None and len(text) > most:
        text = f"{text[:most]}… ({len(text):,} characters; --item shows all)"
    return Text(plain(text))


def sides(run: Record) -> tuple[str, str]:
    """What the two answers are called."""
    assert run.result is not None
    other = run.result.get("label") or run.result["method"]
    return "unsteered", "steered" if run.steers else str(other)


def show(
    names: tuple[str, list[Record]], split: str, which: str | None, item: str | None, limit: int,
    console: Console,
) -> None:  # fmt: skip
    """Print the items. names: what the run or row is called, and its runs; the first is shown."""
    name, (run, *others) = names
    items = answers(run, split)
    if item is not None:
        found, told = [the_item(items, item)], f"one of {len(items):,} items"
    else:
        found, told = chosen(items, which)
    some = found[:limit]
    _say(console, f"{name}, {split}: {told}")
    if others:
        listed = ", ".join(f"{one.sweep}/{one.key}" for one in others)
        _say(console, f"answers of seed {run.config['seed']} ({run.sweep}/{run.key}); other seeds: "
                      f"{listed}")  # fmt: skip
    _say(console, "")
    doses = added(run, split, [one.item_id for one in some])
    for one in some:
        of = None if doses is None else doses.get(one.item_id, [])
        most = None if item is not None else CHARACTERS
        console.print(shown(one, len(items), of, sides(run), most))
    if len(found) > len(some):
        _say(console, f"and {len(found) - len(some):,} more: --limit {len(found)}")


def _say(console: Console, text: str) -> None:
    console.print(plain(text), highlight=False, markup=False, soft_wrap=True)


def main(argv: list[str]) -> int:
    """`python -m crl_exp show RUN [--fixed | --broken | --changed | --item ID_OR_N]`."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp show",
        description="A run's answers beside the unsteered ones: what was asked, the target, the "
        "rewards, and what was added.",
        epilog="RUN: a run (SWEEP/RUN_KEY, its folder, or RUN_KEY), or a row of a report as "
        "SWEEP:METHOD@LAYERS, such as demo:CRL@22; of a row's seeds the first is shown. The "
        "prompt is the task's; methods that ask otherwise (prompting) put it in their own words.",
    )
    parser.add_argument("run", metavar="RUN")
    one_of = parser.add_mutually_exclusive_group()
    for which, what in WHAT.items():
        one_of.add_argument(f"--{which}", dest="which", action="store_const", const=which,
                            help=f"only items {what}")  # fmt: skip
    one_of.add_argument("--item", metavar="ID_OR_N",
                        help="one item, by its id or its number, whole")  # fmt: skip
    parser.add_argument("--limit", type=int, default=SHOWN, metavar="N",
                        help=f"show so many items ({SHOWN})")  # fmt: skip
    parser.add_argument("--split", metavar="NAME", default="test",
                        help="validation or a further test set in place of test")  # fmt: skip
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args(argv)
    if arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit}: give 1 or more")
    name, row = find_rows(arguments.run, arguments.output_dir)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    show((name, list(row.runs)), arguments.split, arguments.which, arguments.item,
         arguments.limit, console)  # fmt: skip
    return 0
