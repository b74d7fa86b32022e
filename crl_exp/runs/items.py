"""items.parquet: a line for each evaluated item, so that any two runs can be paired by item.

Shapes: I items, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from crl_exp.config.errors import UserError
from crl_exp.config.files import replacing
from crl_exp.runs.records import Record

pc: Any = pyarrow.compute  # its functions are made when it is imported, unseen by type checkers
NAME = "items.parquet"
ITEMS = pa.schema(
    [
        ("item_id", pa.string()),
        ("split", pa.string()),
        ("reward_baseline", pa.float64()),
        ("reward_steered", pa.float64()),
        ("changed", pa.bool_()),
        ("group", pa.string()),
    ]
)
"""`changed`: whether the tokens of the answer differ from the unsteered ones. `group`: the item's
subject, category or the like, "" where it has none. Readers name the columns that they want: others
may stand beside them."""
GROUP = "group"  # not in files of earlier versions
TEXTS = pa.schema(
    [
        ("prompt", pa.string()),
        ("target", pa.string()),
        ("answer_baseline", pa.string()),
        ("answer_steered", pa.string()),
    ]
)
"""More columns, not in files of earlier versions: the user's turn as the task has it, the right
answer (null where items have none), and what was answered, unsteered and steered."""
LIKELIHOODS = pa.schema(
    [
        ("log_likelihood_baseline", pa.float64()),
        ("log_likelihood_steered", pa.float64()),
    ]
)
"""More columns, of free text alone and not in files of earlier versions: each answer's mean
log-probability a token under the unsteered model, in nats; null on validation."""
BATCH_ROWS = 500_000
KEPT = 2048
"""Runs whose items a process keeps: each has them asked for more than once."""


class NoItemsError(UserError):
    """A run whose items aren't all on disk: it was made before there was an items.parquet."""


@dataclass(frozen=True)
class ItemRewards:
    """Rewards of a split's items, unsteered and steered [I], in the order of evaluation.

    groups: of each item; None where the run was made before they were written. likelihood: how much
    more likely the unsteered model finds the steered answer than its own [I], nats a token; None
    where the file doesn't have it.
    """

    ids: tuple[str, ...]
    baseline: np.ndarray
    steered: np.ndarray
    groups: tuple[str, ...] | None = None
    likelihood: np.ndarray | None = None


@dataclass(frozen=True)
class ItemTexts:
    """What items ask and what was answered, in their order; see `TEXTS`."""

    prompts: Sequence[str]
    targets: Sequence[str | None]
    baseline: Sequence[str]
    steered: Sequence[str]


def items_table(
    split: str,
    ids: Sequence[str],
    baseline: Sequence[float],
    steered: Sequence[float],
    changed: Sequence[bool],
    groups: Sequence[str],
    texts: ItemTexts | None = None,
    likelihoods: tuple[Sequence[float | None], Sequence[float | None]] | None = None,
) -> pa.Table:
    """A split's part of items.parquet. texts: None in files as earlier versions wrote them.
    likelihoods: of the unsteered and the steered answers; None where the output is restricted."""
    columns: dict[str, list[Any]] = {
        "item_id": list(ids), "split": [split] * len(ids), "reward_baseline": list(baseline),
        "reward_steered": list(steered), "changed": [bool(one) for one in changed],
        "group": list(groups),
    }  # fmt: skip
    fields = [*ITEMS]
    if texts is not None:
        fields += TEXTS
        given = (texts.prompts, texts.targets, texts.baseline, texts.steered)
        for name, values in zip(TEXTS.names, given, strict=True):
            columns[name] = [None if value is None else storable(value) for value in values]
    if likelihoods is not None:
        fields += LIKELIHOODS
        columns |= dict(zip(LIKELIHOODS.names, map(list, likelihoods), strict=True))
    return pa.table(columns, schema=pa.schema(fields))


def storable(text: str) -> str:
    """Text as UTF-8 can hold it: half a pair of surrogates is written out, and all else kept."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_items(folder: Path, tables: Sequence[pa.Table]) -> None:
    path = folder / NAME
    with replacing(path, path.with_suffix(".partial")) as file:
        pq.write_table(pa.concat_tables(tables), file, compression="zstd")


def item_rewards(run: Record, split: str = "test") -> ItemRewards:
    """The rewards of every item of a split, from items.parquet, or else from interventions.parquet,
    which has them for every item that was steered.

    Raises `NoItemsError` where neither covers the split, and `UserError` where an id comes twice or
    items are missing.
    """
    for name, read in ((NAME, _from_items), ("interventions.parquet", _from_interventions)):
        path = run.path / name
        if path.exists():
            found = read(path, split, path.stat().st_mtime_ns)
            if found is not None:
                return _checked(run, split, path, found)
    raise NoItemsError(
        f"{run.path} has no rewards of the single items of {split}: it was run before "
        f"{NAME} was written. `resume=force` runs it again"
    )


def _checked(run: Record, split: str, path: Path, found: ItemRewards) -> ItemRewards:
    twice = len(found.ids) - len(set(found.ids))
    if twice:
        raise UserError(
            f"{path}: {twice} of the {len(found.ids)} items of {split} have an id that another one "
            "has, so that they can't be paired; give each item an id of its own"
        )
    n = _n_of(run, split)
    if n is not None and n != len(found.ids):
        if path.name != NAME:
            raise NoItemsError(
                f"{path} has rewards of {len(found.ids)} of the {n} items of {split}, those that "
                f"were steered, and there is no {NAME}. `resume=force` runs it again"
            )
        raise UserError(f"{path} has {len(found.ids)} items of {split}, but result.json has {n}")
    return found


def _n_of(run: Record, split: str) -> int | None:
    if run.result is None:
        return None
    if split == "test":
        return run.result["n"]
    sets = {**run.result["test_sets"], "validation": run.result["validation"]}
    return sets[split]["n"] if split in sets else None


def _from_items(path: Path, split: str, written: int) -> ItemRewards | None:
    return _all_items(path, written).get(split)


@lru_cache(maxsize=KEPT)
def _all_items(path: Path, _written: int) -> dict[str, ItemRewards]:
    """By split. _written: when the file was, so that one written anew is read anew."""
    columns = ["item_id", "split", "reward_baseline", "reward_steered"]
    try:
        with pq.ParquetFile(path) as file:
            table = file.read([*columns, GROUP, *LIKELIHOODS.names], use_threads=False)
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); resume=force runs it again") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; resume=force runs it again")
    kind = table.schema.field("item_id").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(
            f"{path}: item_id is {kind}, but ids are text (007 and 7 are two items); write them so"
        )
    return {
        split: _rewards(table.filter(pc.equal(table["split"], split)), "item_id")
        for split in pc.unique(table["split"]).to_pylist()
    }


@lru_cache(maxsize=KEPT)
def _from_interventions(path: Path, split: str, _written: int) -> ItemRewards | None:
    """One line an item of those that were steered. A long answer steered at every layer has
    millions of rows: they are read in batches."""
    file = pq.ParquetFile(path, read_dictionary=["item"])
    columns = ["item", "reward_baseline", "reward_steered"]
    if not set(columns) <= set(file.schema_arrow.names):
        return None
    parts = []
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=["split", *columns]):
        rows = pa.Table.from_batches([batch])
        rows = rows.filter(pc.equal(rows["split"], split)).select(columns)
        rows = rows.set_column(0, "item", rows["item"].cast(pa.string()))
        parts.append(rows.group_by(columns, use_threads=False).aggregate([]))
    if not parts:
        return None
    table = pa.concat_tables(parts).group_by(columns, use_threads=False).aggregate([])
    return _rewards(table, "item") if len(table) else None


def _rewards(table: pa.Table, id_column: str) -> ItemRewards:
    was, now = (table[f"reward_{name}"].to_numpy() for name in ("baseline", "steered"))
    groups = _one(tuple(table[GROUP].to_pylist())) if GROUP in table.column_names else None
    ids = _one(tuple(table[id_column].to_pylist()))
    return ItemRewards(
        ids, was.astype(np.float64), now.astype(np.float64), groups, _likelihood(table)
    )


def _likelihood(table: pa.Table) -> np.ndarray | None:
    if not set(LIKELIHOODS.names) <= set(table.column_names):
        return None
    was, now = (table[name] for name in LIKELIHOODS.names)
    return None if was.null_count or now.null_count else now.to_numpy() - was.to_numpy()


@lru_cache(maxsize=64)
def _one(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Of equal ones the first: a sweep's runs have the same ids, and need them once."""
    return texts


def aligned(runs: Sequence[tuple[Record, ItemRewards]], split: str) -> list[ItemRewards]:
    """The same items in one order, that of the first run.

    Raises `UserError` with counts where the items are not the same.
    """
    (first, wanted), *others = runs
    found = [wanted]
    for run, rewards in others:
        if rewards.ids == wanted.ids:
            found.append(rewards)
            continue
        place = {item: at for at, item in enumerate(rewards.ids)}
        only = [len(set(a) - set(b)) for a, b in ((wanted.ids, place), (place, wanted.ids))]
        if any(only):
            raise UserError(
                f"{first.path.parent.name}/{first.key} and {run.path.parent.name}/{run.key} were "
                f"not asked the same items of {split}: {only[0]} are only in the first, {only[1]} "
                "only in the second. Pairing takes the same items: the same task, split_seed, "
                f"n_test and data"
            )
        at = [place[item] for item in wanted.ids]
        groups = None if rewards.groups is None else tuple(rewards.groups[i] for i in at)
        likelihood = None if rewards.likelihood is None else rewards.likelihood[at]
        found.append(
            ItemRewards(wanted.ids, rewards.baseline[at], rewards.steered[at], groups, likelihood)
        )
    return found


class SeedRewards(NamedTuple):
    """Rewards of the same items under each seed [S, I]. groups: of each item; None: not known."""

    ids: tuple[str, ...]
    baseline_SI: np.ndarray
    steered_SI: np.ndarray
    groups: tuple[str, ...] | None


def rewards_of_seeds(runs: Sequence[Record], split: str) -> SeedRewards:
    """Of runs that differ in their seed or draw of training items, the items in one order.

    A line is what varies by itself: a seed's run or, where several draws of training items have
    several seeds each, a draw's, the mean over its seeds; runs of one draw share its items.
    Raises `NoItemsError` where a run has none, and `UserError` where the items are not the same.
    """
    same = aligned([(run, item_rewards(run, split)) for run in runs], split)
    units = _independent(runs)
    return SeedRewards(
        same[0].ids,
        np.stack([np.mean([same[i].baseline for i in own], axis=0) for own in units]),
        np.stack([np.mean([same[i].steered for i in own], axis=0) for own in units]),
        next((one.groups for one in same if one.groups is not None), None),
    )


def likelihood_of_seeds(runs: Sequence[Record], split: str) -> np.ndarray | None:
    """Differences of log-likelihood of the same items [S, I], lines as in `rewards_of_seeds`; None
    where a run's file doesn't have them. Raises as that does."""
    same = [one.likelihood for one in aligned([(r, item_rewards(r, split)) for r in runs], split)]
    known = [likelihood for likelihood in same if likelihood is not None]
    if len(known) < len(same):
        return None
    return np.stack([np.mean([known[i] for i in own], axis=0) for own in _independent(runs)])


def _independent(runs: Sequence[Record]) -> list[list[int]]:
    """Places of the runs that make one line of `rewards_of_seeds`."""
    by_draw: dict[Any, list[int]] = {}
    for i, run in enumerate(runs):
        by_draw.setdefault(run.config["task"].get("train_seed"), []).append(i)
    if len(by_draw) > 1 and len(by_draw) < len(runs):
        return list(by_draw.values())
    return [[i] for i in range(len(runs))]
