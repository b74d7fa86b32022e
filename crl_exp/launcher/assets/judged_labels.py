"""Labels of features by a language model, and how well each tells texts apart that it never saw.

The model is shown the texts at which a feature is strongest, among training items, and names what
they share. Then it is asked of held-out texts, half of which the feature is active on, whether the
label fits (detection, after Paulo et al. 2024, arXiv 2410.13928). With halves of one size balanced
accuracy is the share answered rightly; guessing and a label that fits everything are at .5.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from crl_exp.analysis.statistics import share_interval
from crl_exp.config.errors import UserError
from crl_exp.tasks.own.judge_calls import Calls

LONGEST = 200
"""Characters of a label."""
SHOWN = 1500
"""Characters of a text that the judge is shown."""
FEWEST = 5
"""Held-out texts of each half, below which there is no score."""
LABEL = """One feature of a language model was most active on these texts. After each stands the \
token at which it was strongest.

{texts}

In at most twelve words, what do these texts have in common that such a feature may stand for? \
Reply with that description alone, on one line."""
DETECT = """Description: {label}

Text: {text}

Does the description fit the text? Reply with yes or no alone."""


@dataclass(frozen=True)
class Active:
    """How strongly a feature is active on a text: its largest activation, and the token there."""

    text: str
    activation: float
    token: str


@dataclass(frozen=True)
class Judged:
    """A label with its score. n: held-out texts, half of them active ones. hits, passes: of those
    halves, the share to which the judge said yes and the share to which it said no."""

    label: str
    balanced_accuracy: float
    interval: tuple[float, float]
    n: int
    hits: float
    passes: float


def judged(
    calls: Calls, model: str, train: Sequence[Active], held: Sequence[Active], n_texts: int, n: int
) -> Judged:
    """Ask for a label from the `n_texts` strongest of the training texts, and score it on n texts
    held out.

    Raises `UserError` where the feature isn't active on enough texts, or is on too many, and where
    the judge is away or goes on replying what can't be read.
    """
    on = [one for one in held if one.activation > 0]
    off = [one for one in held if one.activation <= 0]
    half = min(n // 2, len(on), len(off))
    if half < FEWEST:
        raise UserError(
            f"it is active on {len(on)} and silent on {len(off)} of {len(held)} held-out texts: "
            f"{FEWEST} of each are needed for a score"
        )
    top = sorted((one for one in train if one.activation > 0), key=lambda one: -one.activation)
    if not top:
        raise UserError(f"it is active on none of {len(train)} training texts")
    label = _label(calls, model, top[:n_texts])
    asked = [*_drawn(on, half), *_drawn(off, half)]

    def fits(one: Active) -> bool:
        prompt = DETECT.replace("{label}", label).replace("{text}", one.text[:SHOWN])
        return _asked(calls, model, prompt, 16, _yes_or_no)

    pool = ThreadPoolExecutor(4, thread_name_prefix="judge")
    try:
        jobs = [pool.submit(fits, one) for one in asked]
        said = [job.result() for job in jobs]
    finally:
        pool.shutdown(cancel_futures=True)
    hits, passes = sum(said[:half]) / half, 1 - sum(said[half:]) / half
    accuracy = (hits + passes) / 2
    return Judged(label, accuracy, share_interval(accuracy, 2 * half), 2 * half, hits, passes)


def _label(calls: Calls, model: str, top: Sequence[Active]) -> str:
    texts = "\n".join(
        f"{n}. {one.text[:SHOWN]}\n   (strongest at {one.token!r})" for n, one in enumerate(top, 1)
    )
    return _asked(calls, model, LABEL.replace("{texts}", texts), 64, _one_line)


def _asked(
    calls: Calls, model: str, prompt: str, max_tokens: int, read: Callable[[str], Any]
) -> Any:
    body = {
        "model": model, "temperature": 0, "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": prompt}],
    }  # fmt: skip
    return read(calls.reply(body, lambda text: read(text) is not None))


def _one_line(reply: str) -> str | None:
    """A label; None for what is none: nothing, or an essay."""
    text = " ".join(reply.split()).strip("\"'`* ")
    return text if 0 < len(text) <= LONGEST else None


def _yes_or_no(reply: str) -> bool | None:
    word = re.split(r"\W", reply.strip(" \n\t*\"'`").lower(), maxsplit=1)[0]
    return {"yes": True, "no": False}.get(word)


def _drawn(texts: Sequence[Active], n: int) -> list[Active]:
    """n of them, the same ones every time, whatever their activation."""
    return sorted(texts, key=lambda one: hashlib.sha256(one.text.encode()).hexdigest())[:n]
