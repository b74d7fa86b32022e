"""From a user turn to the tokens that the model is fed, the last of which is steered first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from crl_exp.config.errors import UserError, did_you_mean


def chat_ids(
    tokenizer: Any,
    user: str,
    args: Mapping[str, Any],
    model: str,
    before: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Tokens of a user turn in the tokenizer's chat template, up to where the answer begins.

    args: what the template is given besides (`model.chat_template_args`). before: user turns with
    their answers that stand before it. Raises `UserError` where there is no template, it takes no
    such argument, or it can't be rendered.
    """
    template = str(tokenizer.chat_template or "")
    if not template:
        raise UserError(f"model {model} has no chat template; set task.chat_template=false")
    for name in args:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            known = sorted(set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", template)))
            raise UserError(
                f"model.chat_template_args.{name}: the chat template of {model} takes no such "
                f"argument{did_you_mean(name, known)}"
            )
    turns = [
        {"role": role, "content": text}
        for pair in before
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    turns.append({"role": "user", "content": user})
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **args
        )
    # A fault of the template, what jinja's sandbox forbids, or an argument of another kind.
    except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(
            f"model {model}: its chat template can't be rendered ({error}); mend chat_template in "
            "the model's folder, or set task.chat_template=false"
        ) from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a plain text without what the tokenizer puts behind it, if anything.

    Steering begins at the last token: it must be the text's, not a mark of its end (some
    tokenizers append one, with `add_eos_token` or by their template).
    """
    ids = tokenizer(text)["input_ids"]
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not own:
        return ids
    for start in range(len(ids) - len(own) + 1):
        if ids[start : start + len(own)] == own:
            return ids[: start + len(own)]
    return ids


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all prompts share, short of each one's last token."""
    if not prompts:
        return 0
    ordered = sorted(list(p) for p in prompts)
    first, last = ordered[0], ordered[-1]
    limit = min(len(p) for p in prompts) - 1
    shared = next((i for i in range(limit) if first[i] != last[i]), limit)
    return max(shared, 0)
