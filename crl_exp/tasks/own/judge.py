"""Answers scored by a language model behind an OpenAI-compatible endpoint (`task.scorer=judge`).

What it is asked is the template with the item and the answer put in; its reply is read as a number
from 0 to 1, or as yes or no. Any other reply is asked for again, and ends the run in the end: a
reward is never made up. How it is asked and kept: `judge_calls`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.tasks.base import Item, Score
from crl_exp.tasks.own.answer_kinds import bare
from crl_exp.tasks.own.function import as_row, shown
from crl_exp.tasks.own.judge_calls import Calls

REPLIES = ("number", "yes_no")
_FIELD = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d*)?|\.\d+)(?![\w])")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class JudgeConfig:
    """A judge.

    base_url: of the endpoint, as in http://HOST:8000/v1, to which /chat/completions is added.
    model: as the endpoint names it. api_key_from: name of the environment variable with the key;
        null: none is sent.
    template: what it is asked; {question} is the user turn, {answer} the model's answer,
        {reference} the line's answer, {NAME} another field of the line.
    reply: number (one from 0 to 1) or yes_no. max_tokens: of a reply; null: the endpoint's own.
    timeout_seconds: of one try. tries: of a call, at most, where the endpoint is busy (429), fails
        (5xx) or can't be reached; apart from these, calls for a reply that can be read.
        wait_seconds: before the second try of a call; twice as long before each further one, up to
        a minute, or as long as the endpoint asks for. parallel: calls at a time.
    """

    base_url: str | None
    model: str | None
    api_key_from: str | None
    template: str
    reply: str
    max_tokens: int | None
    timeout_seconds: float
    tries: int
    wait_seconds: float
    parallel: int

    def faults(self) -> list[str]:
        """What is wrong with the values, each with the override that mends it."""
        found = []
        if not self.model:
            found.append("task.judge.model: is not given; set it to a model of the endpoint")
        if why := url_fault(self.base_url or ""):
            found.append(f"task.judge.base_url: {why}")
        if self.api_key_from is not None and not _VARIABLE.fullmatch(self.api_key_from):
            # Not shown: it may be the key.
            found.append(
                "task.judge.api_key_from: must be the name of an environment variable that holds "
                "the key, not the key"
            )
        if "answer" not in _FIELD.findall(self.template):
            found.append("task.judge.template: must hold {answer}, the answer that is judged")
        if self.reply not in REPLIES:
            near = did_you_mean(self.reply, REPLIES)
            found.append(
                f"task.judge.reply={self.reply}: must be one of {', '.join(REPLIES)}{near}"
            )
        for name in ("max_tokens", "tries", "parallel"):
            if (value := getattr(self, name)) is not None and value < 1:
                found.append(f"task.judge.{name}={value}: must be at least 1")
        if self.timeout_seconds <= 0:
            found.append(f"task.judge.timeout_seconds={self.timeout_seconds}: must be over 0")
        if self.wait_seconds < 0:
            found.append(f"task.judge.wait_seconds={self.wait_seconds}: must not be negative")
        return found


def url_fault(
    url: str,
    example: str = "task.judge.base_url=http://HOST:8000/v1",
    key_from: str = "task.judge.api_key_from",
) -> str:
    """What is wrong with an endpoint's address; "" for nothing."""
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname is not None
    except ValueError:
        return "is no address"
    if not named:
        return f"must be the address of an endpoint, as in {example}"
    if "@" in parts.netloc or parts.query or parts.fragment:
        return f"must hold no user, password or query; a key is given by {key_from}"
    return ""


class Judge:
    """Asks one judge, and counts what that took."""

    def __init__(self, config: JudgeConfig):
        self.config = config
        self.calls = Calls(
            str(config.base_url).rstrip("/"), config.api_key_from, config.timeout_seconds,
            config.tries, config.wait_seconds,
        )  # fmt: skip

    @property
    def name(self) -> str:
        of = json.dumps([self.config.template, self.config.reply, self.config.max_tokens])
        digest = hashlib.sha256(of.encode()).hexdigest()[:8]
        return f"judge({self.config.model}@{self.calls.base_url}, {digest})"

    def load(self) -> None:
        """Raises `UserError` where the key isn't set or the endpoint can't be reached."""
        self.calls.check()

    def missing(self, item: Item) -> list[str]:
        """Fields of the template that an item lacks."""
        fields = self._fields(item, "")
        return [name for name in _FIELD.findall(self.config.template) if fields.get(name) is None]

    def __call__(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        """Raises `UserError` with the item where there is no reward for it."""
        asked = [self._asked(item, output) for item, output in zip(items, outputs, strict=True)]
        first = dict(zip(reversed(asked), reversed(items), strict=True))
        rewards: dict[str, float] = {}
        pool = ThreadPoolExecutor(self.config.parallel, thread_name_prefix="judge")
        try:
            jobs = {text: pool.submit(self._reward, text, item) for text, item in first.items()}
            for text, job in jobs.items():
                rewards[text] = job.result()
        finally:
            pool.shutdown(cancel_futures=True)
        return [
            Score(rewards[text], valid=bool(o.strip()))
            for text, o in zip(asked, outputs, strict=True)
        ]

    def _asked(self, item: Item, output: str) -> str:
        fields = self._fields(item, output)
        return _FIELD.sub(lambda found: str(fields[found[1]]), self.config.template)

    def _fields(self, item: Item, output: str) -> dict[str, object]:
        row = as_row(item)
        return {**row, "question": item.user, "answer": output, "reference": item.target}

    def _reward(self, prompt: str, item: Item) -> float:
        body = {
            "model": self.config.model, "temperature": 0,
            "messages": [{"role": "user", "content": prompt}],
        }  # fmt: skip
        if self.config.max_tokens is not None:
            body["max_tokens"] = self.config.max_tokens
        try:
            reply = self.calls.reply(body, lambda text: self.read(text) is not None)
        except UserError as error:
            raise UserError(f"{error}; {shown(item)}") from error
        found = self.read(reply)
        assert found is not None
        return found

    def read(self, reply: str) -> float | None:
        """The reward that a reply gives; None where it gives none."""
        if self.config.reply == "yes_no":
            word = re.split(r"\W", bare(reply), maxsplit=1)[0]
            return {"yes": 1.0, "no": 0.0}.get(word)
        numbers = [float(text) for text in _NUMBER.findall(reply)]
        return numbers[0] if len(numbers) == 1 and 0 <= numbers[0] <= 1 else None
