"""From a user turn to the tokens that the model is fed, the last of which is steered first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from crl_exp.errors import UserError, did_you_mean


def chat_ids(tokenizer: Any, user: str, args: Mapping[str, Any], model: str) -> list[int]:
    """Tokens of a user turn in the tokenizer's chat template, up to where the answer begins.

    args: what the template is given besides (`model.chat_template_args`). Raises `UserError` where
    there is no template, or it takes no such argument.
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
    turns = [{"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **args)
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
