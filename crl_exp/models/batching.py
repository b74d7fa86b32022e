"""How many rows go through the model together, and which.

`engine.batch_size=auto` starts from an estimate with a margin; a batch that does not fit is
halved, and so are all later ones. What was done before is kept.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from crl_exp.config.errors import UserError
from crl_exp.models.language_model import LanguageModel

log = logging.getLogger(__name__)
MARGIN = 0.7
"""Share of the free memory that `auto` plans with."""
MOST_ROWS = 1024
CGROUP = Path("/sys/fs/cgroup")
Row = TypeVar("Row")


class BatchSize:
    """A number of rows, or `auto`: as many as fit. `most`: rows that are tried, none more."""

    def __init__(self, asked: int | str):
        self.asked = asked
        self.most = asked if isinstance(asked, int) else MOST_ROWS

    def rows(
        self, bytes_a_row: int, devices: torch.device | Sequence[torch.device], held: int = 0
    ) -> int:
        """Rows of this size that are planned for a batch. held: bytes of it that are there.

        devices: of several, the fullest decides, as if it held whole rows.
        """
        if isinstance(self.asked, int):
            return self.asked
        devices = [devices] if isinstance(devices, torch.device) else devices
        free = min(free_bytes(device) for device in devices)
        fit = int(MARGIN * (free + held)) // max(bytes_a_row, 1)
        return max(1, min(self.most, fit))

    def play(self, batches: Iterable[list[Row]], play: Callable[[list[Row]], None]) -> None:
        """Play every batch, the larger ones in parts once one didn't fit.

        Raises `UserError` where one doesn't fit and the size was given, or is one row.
        """
        waiting = deque(batches)
        while waiting:
            rows = waiting.popleft()
            if len(rows) > self.most:
                parts = [rows[at : at + self.most] for at in range(0, len(rows), self.most)]
                waiting.extendleft(reversed(parts))
                continue
            fault = _tried(play, rows)
            if fault is not None:
                self._lower(len(rows), fault)
                waiting.appendleft(rows)

    def _lower(self, n_rows: int, fault: str) -> None:
        if n_rows == 1 or isinstance(self.asked, int):
            smaller = "; choose a smaller model or shorter prompts and answers"
            if n_rows > 1:
                smaller = f"; set engine.batch_size={n_rows // 2} or engine.batch_size=auto"
            raise UserError(f"{n_rows} rows don't fit into memory ({fault}){smaller}")
        self.most = n_rows // 2
        log.warning(
            "%d rows don't fit into memory; going on with %d at a time (%s)",
            n_rows, self.most, fault,
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _tried(play: Callable[[list[Row]], None], rows: list[Row]) -> str | None:
    """What was said when the memory was not enough, or None where it was.

    A function of its own: on return the failed call's frames, and with them its tensors, are gone.
    """
    try:
        play(rows)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return str(error).strip().splitlines()[0] if str(error) else type(error).__name__
    except RuntimeError as error:
        # The CPU's allocator has no error class of its own.
        if "can't allocate memory" not in str(error):
            raise
        return str(error).strip().splitlines()[0]
    return None


def batches(
    lengths: Sequence[Sequence[int]], size: int, starts: Sequence[int], enough: int
) -> list[list[tuple[int, int]]]:
    """Cut the rows of several jobs into batches of (job, position among the job's items).

    lengths: of each job's prompts. starts: the layer that each job's rows start at; those of a
    batch start at its lowest, so that a job with another start begins a new batch once there are
    `enough` rows in the last. Where one batch doesn't hold all, prompts of like length go
    together, the longest first: what doesn't fit into memory shows at once. Within a batch the
    jobs' order and their items' is kept.
    """
    rows = [(job, at) for job, own in enumerate(lengths) for at in range(len(own))]
    alike: list[list[tuple[int, int]]] = []
    for row in sorted(rows, key=lambda row: starts[row[0]]):
        begins = not alike or (
            starts[row[0]] != starts[alike[-1][-1][0]] and len(alike[-1]) >= min(enough, size)
        )
        if begins:
            alike.append([])
        alike[-1].append(row)
    cut: list[list[tuple[int, int]]] = []
    for group in alike:
        if len(group) > size:
            group.sort(key=lambda row: (-lengths[row[0]][row[1]], row))
        cut += [sorted(group[at : at + size]) for at in range(0, len(group), size)]
    return cut


def bytes_to_decode(lm: LanguageModel, n_tokens: int) -> int:
    """Rough memory of one row of `n_tokens`, prompt and answer: keys and values, twice while they
    are gathered or compacted, the mask, and float32 scores of the vocabulary."""
    keys_values = 2 * lm.n_layers * lm.d_kv * n_tokens * lm.dtype.itemsize
    vocabulary = lm.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    return 2 * keys_values + 16 * n_tokens + 8 * vocabulary + 64 * lm.d_model * lm.dtype.itemsize


def bytes_to_keep(lm: LanguageModel, n_tokens: int, n_layers: int) -> int:
    """Memory of one row's residuals, or additions, of `n_tokens` at `n_layers`, in float32."""
    return 4 * lm.d_model * n_tokens * n_layers


def bytes_to_read(lm: LanguageModel, n_tokens: int) -> int:
    """Rough memory of reading one prompt: keys and values, one layer's hidden states, and its
    attention scores in float32 for eager attention."""
    keys_values = 2 * lm.n_layers * lm.d_kv * n_tokens * lm.dtype.itemsize
    heads = max(1, lm.model.config.get_text_config().num_attention_heads)  # type: ignore[operator, union-attr]
    return (
        2 * keys_values + 40 * lm.d_model * n_tokens * lm.dtype.itemsize + 8 * heads * n_tokens**2
    )


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had: of the GPU, or of this machine or container."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if (
        limit.is_file()
        and used.is_file()
        and (most := limit.read_text(encoding="utf-8").strip()) != "max"
    ):
        free = min(free, int(most) - int(used.read_text(encoding="utf-8")))
    return max(free, 0)
