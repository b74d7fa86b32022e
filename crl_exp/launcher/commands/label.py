"""`python -m crl_exp label RUN --feature LAYER/INDEX …`: a judge names features, and is tested.

Texts are the user turns of the run's task: the label is made from training items and scored on
validation items; no test item is read. A feature counts as active on a text where it is above 0 at
a token that not all prompts begin with.
Shapes: B prompts, T tokens, D d_model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crl_exp.config.errors import UserError
from crl_exp.config.files import read_json, write_json
from crl_exp.launcher.assets.judged_labels import Active, Judged, judged
from crl_exp.launcher.finished import FinishedRun, load_run
from crl_exp.models.activations import read_forward
from crl_exp.report.feature_labels import JUDGED
from crl_exp.tasks.base import Item
from crl_exp.tasks.own.judge import url_fault
from crl_exp.tasks.own.judge_calls import Calls, Named

NAMED = Named(
    "--base-url", "--api-key-from", "Take another --model: it must reply with a line, or yes or no"
)


def main(argv: list[str]) -> int:
    """Returns 1 where a feature couldn't be labelled; each is told."""
    args = _parser().parse_args(argv)
    if why := url_fault(args.base_url, "--base-url=http://HOST:8000/v1", "--api-key-from"):
        raise UserError(f"--base-url: {why}")
    wanted = [_feature(text) for text in args.feature]
    run = load_run(args.run)
    calls = Calls(
        args.base_url.rstrip("/"), args.api_key_from, args.timeout, args.tries, args.wait, NAMED
    )
    calls.check()
    splits, failed = run.task.drawn(), 0
    path = run.path / JUDGED
    for layer, feature in wanted:
        texts = activations(run, layer, feature, [*splits.train, *splits.validation])
        train, held = texts[: len(splits.train)], texts[len(splits.train) :]
        try:
            found = judged(calls, args.model, train, held, args.texts, args.held_out)
        except UserError as error:
            print(f"{layer}/{feature}: no label ({error})", flush=True)
            failed += 1
            continue
        kept = read_json(path, "remove it") or {}
        by = {"model": args.model, "base_url": calls.base_url}
        write_json(path, {**kept, f"{layer}/{feature}": {**asdict(found), **by}})
        print(f"{layer}/{feature}: {_told(found)}", flush=True)
    print(f"{calls.counts['calls']} calls, {calls.counts['kept']} replies found on disk")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp label",
        description="Have a language model behind an OpenAI-compatible endpoint name features, "
        "from the training texts at which they are strongest, and test each label on held-out "
        "texts.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, outputs/SWEEP/KEY")
    parser.add_argument(
        "--feature", action="append", required=True, metavar="LAYER/INDEX", help="may be repeated"
    )
    parser.add_argument("--base-url", required=True, help="of the endpoint, http://HOST:8000/v1")
    parser.add_argument("--model", required=True, help="as the endpoint names it")
    parser.add_argument("--api-key-from", help="environment variable that holds the key")
    parser.add_argument("--texts", type=_positive, default=12, help="that the label is made from")
    parser.add_argument("--held-out", type=_positive, default=40, help="that it is tested on")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds of one try")
    parser.add_argument("--tries", type=_positive, default=5, help="of a call, and for a reply")
    parser.add_argument("--wait", type=float, default=1.0, help="seconds before the second try")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number from 1")
    return int(text)


def _feature(text: str) -> tuple[int, int]:
    layer, _, feature = text.partition("/")
    if not (layer.isdecimal() and feature.isdecimal()):
        raise UserError(f"--feature {text}: must be LAYER/INDEX, as in 12/3290")
    return int(layer), int(feature)


def _told(found: Judged) -> str:
    low, high = found.interval
    return (
        f"{found.label}\n    balanced accuracy {found.balanced_accuracy:.2f} [{low:.2f}, "
        f"{high:.2f}] on {found.n} held-out texts, chance .5 (said yes to {found.hits:.0%} of the "
        f"active ones, no to {found.passes:.0%} of the others)"
    )


def activations(run: FinishedRun, layer: int, feature: int, items: Sequence[Item]) -> list[Active]:
    """How strongly a feature is active on the user turn of each item.

    Raises `UserError` for a layer that the run has no SAE of, and a feature that isn't in it.
    """
    if layer not in run.result["layers"]:
        there = ", ".join(map(str, run.result["layers"])) or "none"
        raise UserError(f"--feature {layer}/{feature}: the run's layers are {there}")
    sae, lm = run.sae(layer), run.lm
    if feature >= sae.d_sae:
        raise UserError(f"--feature {layer}/{feature}: the SAE has features 0 to {sae.d_sae - 1}")
    ids = [lm.prompt_ids(item.user, run.task.chat_template) for item in items]
    first = _first_own(ids)
    encode = sae.encoder(torch.tensor([feature], device=lm.device))
    found: list[Active] = []
    size = run.exp.engine.items_together
    for at in range(0, len(items), size):
        kept: dict[int, Tensor] = {}
        see: Any = {sae.site: partial(kept.__setitem__, sae.site)}
        with torch.no_grad():
            read_forward(lm, ids[at : at + size], see)
        for row, prompt in enumerate(ids[at : at + size]):
            act_T = encode(kept[sae.site][row, first : len(prompt)])[:, 0]
            value, where = act_T.max(dim=0)
            token = lm.tokenizer.decode([prompt[first + int(where)]])
            found.append(Active(items[at + row].user, float(value), token))
    return found


def _first_own(ids: Sequence[Sequence[int]]) -> int:
    """The first position at which prompts may differ; never the very first token, an outlier in
    most models, and never behind the end of the shortest."""
    same = 0
    for tokens in zip(*ids, strict=False):
        if len(set(tokens)) > 1:
            break
        same += 1
    return max(1, min(same, min(map(len, ids)) - 1))
