"""Calls of an OpenAI-compatible endpoint: kept on disk, tried again within limits, counted.

A reply is kept under the digest of endpoint and request, so that the same content is paid for once,
by whichever run; a lock for each lets one process ask while others wait for its reply. The key is
read from the environment when it is sent, and is in no file, message or log.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import requests
from filelock import FileLock
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.util.retry import Retry

from crl_exp.config.errors import UserError
from crl_exp.config.files import content_key, read_json, write_json, writing
from crl_exp.config.machine.assets import cache_dir

AGAIN = (408, 429, 500, 502, 503, 504)
"""Statuses that say that a later try may do."""
LONGEST_WAIT = 60.0
"""Seconds between two tries, also where the endpoint asks for more."""


class _Bearer(AuthBase):
    """Sends the key, or none; never one that a .netrc has."""

    def __init__(self, key: str | None):
        self.key = key

    def __call__(self, request: Any) -> Any:
        if self.key is not None:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


class _Tries(Retry):
    """Waits before the second try already, and never for longer than `LONGEST_WAIT`."""

    def get_backoff_time(self) -> float:
        n = len(self.history)
        return min(LONGEST_WAIT, self.backoff_factor * 2 ** (n - 1)) if n else 0.0

    def get_retry_after(self, response: Any) -> float | None:
        asked = super().get_retry_after(response)
        return None if asked is None else min(asked, LONGEST_WAIT)


class Named(NamedTuple):
    """How messages name what is typed: the address, the key's variable, and what to do about
    replies that can't be read."""

    base_url: str = "task.judge.base_url"
    key_from: str = "task.judge.api_key_from"
    advice: str = (
        "Ask for it plainly in task.judge.template, raise task.judge.max_tokens, or see "
        "task.judge.reply"
    )


OF_TASKS = Named()


class Calls:
    """counts: calls that were made (tries again too), replies found on disk, and tries again."""

    def __init__(
        self,
        base_url: str,
        key_from: str | None,
        timeout: float,
        tries: int,
        wait: float,
        named: Named = OF_TASKS,
    ):
        self.named = named
        self.base_url, self.key_from, self.timeout, self.tries = base_url, key_from, timeout, tries
        self.retry = _Tries(
            total=tries - 1, status_forcelist=AGAIN, allowed_methods=None, backoff_factor=wait,
            raise_on_status=False, redirect=0, raise_on_redirect=False,
        )  # fmt: skip
        self.counts = {"calls": 0, "kept": 0, "tried_again": 0}
        self._lock, self._local = threading.Lock(), threading.local()

    @property
    def where(self) -> str:
        return f"{self.named.base_url}={self.base_url}"

    def check(self) -> None:
        """Raises `UserError` where the key isn't set or nothing answers at the endpoint."""
        self._sent("GET", "/models", None)

    def reply(self, body: dict[str, Any], reads: Callable[[str], bool]) -> str:
        """What the model replies; asked again where that can't be read.

        Raises `UserError` where there is no such reply after all tries.
        """
        path = cache_dir() / "judge" / f"{content_key([self.base_url, body])}.json"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            kept = read_json(path, "remove it")
            if kept is not None and reads(str(kept.get("reply"))):
                self._count(kept=1)
                return str(kept["reply"])
            said = ""
            for attempt in range(self.tries):
                self._count(tried_again=int(attempt > 0))
                said = self._asked(body)
                if reads(said):
                    write_json(path, {"reply": said})
                    return said
        raise UserError(
            f"{self.where}: {body['model']} gave no reply that can be read in {self.tries} tries; "
            f"the last was {said[:80]!r}. {self.named.advice}"
        )

    def _asked(self, body: dict[str, Any]) -> str:
        response = self._sent("POST", "/chat/completions", body)
        if response.status_code in (401, 403):  # such replies may repeat the key
            which = f"the key in {self.key_from}" if self.key_from else "calls without a key"
            raise UserError(f"{self.where}: refused {which} ({response.status_code})")
        if not response.ok or response.is_redirect:
            said = self._without_key(response.text.strip()[:200])
            raise UserError(f"{self.where}: answered {response.status_code} ({said})")
        try:
            found = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{self.where}: its answer is none of an OpenAI-compatible endpoint "
                f"({self._without_key(response.text[:80])!r})"
            ) from error
        return found if isinstance(found, str) else ""

    def _sent(self, method: str, path: str, body: dict[str, Any] | None) -> requests.Response:
        """Raises `UserError` where nothing answers after all tries."""
        auth = _Bearer(self._key())
        try:
            response = self._session().request(
                method, self.base_url + path, json=body, auth=auth, timeout=self.timeout,
                allow_redirects=False,
            )  # fmt: skip
        except requests.RequestException as error:
            if method == "POST":
                self._count(calls=self.tries, tried_again=self.tries - 1)
            said = self._without_key(str(error))
            raise UserError(
                f"{self.where}: can't be reached in {self.tries} tries of {self.timeout:g} s "
                f"({said})"
            ) from None  # the error holds the request, and that the key
        more = len(getattr(response.raw.retries, "history", ()))
        if method == "POST":
            self._count(calls=1 + more, tried_again=more)
        return response

    def _session(self) -> requests.Session:
        """One for each thread."""
        if not hasattr(self._local, "session"):
            session = requests.Session()
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=self.retry))
            self._local.session = session
        return self._local.session

    def _key(self) -> str | None:
        if self.key_from is None:
            return None
        key = os.environ.get(self.key_from, "").strip()
        if not key:
            raise UserError(
                f"{self.named.key_from}={self.key_from}: there is no such environment variable, "
                "or it is empty; jobs need it too"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"{self.named.key_from}={self.key_from}: the variable holds a character that no "
                "key has"
            )
        return key

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self.key_from, "").strip() if self.key_from else ""
        return text.replace(key, "…") if key else text

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, n in more.items():
                self.counts[name] += n
