"""task.scorer=judge: a real server on loopback that behaves as it is told, and counts its calls."""

from __future__ import annotations

import json
import logging
import multiprocessing
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from crl_exp.config.errors import UserError
from crl_exp.config.keys import run_key
from crl_exp.config.sections import build
from crl_exp.tasks.base import Item, Task
from crl_exp.tasks.jsonl import JsonLines
from tests.helpers.tiny_run import quickly_composed, run_small

KEY = "sk-secret-0123456789"
Answer = tuple[int, str, dict[str, str]]


class Endpoint:
    """Answers calls by `behave(number of this call, prompt) -> (status, reply, headers)`."""

    def __init__(self) -> None:
        self.behave: Callable[[int, str], Answer] = lambda n, prompt: (200, "0.5", {})
        self.prompts: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.go_on = threading.Event()
        lock, endpoint = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answered(404, b"{}", {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                with lock:
                    endpoint.prompts.append(body["messages"][0]["content"])
                    endpoint.bodies.append(body)
                    endpoint.keys.add(self.headers.get("Authorization"))
                    n = len(endpoint.prompts)
                status, reply, headers = endpoint.behave(n, body["messages"][0]["content"])
                made = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
                text = json.dumps(made) if status == 200 else reply
                self.answered(status, text.encode(), headers)

            def answered(self, status: int, data: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint(tmp_path, monkeypatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))
    made = Endpoint()
    yield made
    made.go_on.set()
    made.server.shutdown()
    made.server.server_close()


def typed(folder: Path, url: str, *more: str) -> list[str]:
    rows = [{"question": f"w{n} w1", "answer": f"w{n}", "rubric": "short"} for n in range(60)]
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["task=jsonl", f"task.path={path}", "task.choices=null", "task.max_new_tokens=2",
            "task.n_train=24", "task.n_validation=8", "task.n_test=16", "task.scorer=judge",
            f"task.judge.base_url={url}", "task.judge.model=m", "task.judge.wait_seconds=0",
            "task.judge.tries=3", *more]  # fmt: skip


def task_of(overrides: list[str]) -> JsonLines:
    made = build(quickly_composed(overrides).task, "task", Task)
    assert isinstance(made, JsonLines)
    return made


ITEMS = [Item(f"id{n}", f"q{n}", f"a{n}") for n in range(4)]
OUTPUTS = [f"says {n}" for n in range(4)]


def rewards(task: Task, items: list[Item] = ITEMS, outputs: list[str] = OUTPUTS) -> list[float]:
    return [score.reward for score in task.score(items, outputs)]


def test_each_answer_gets_the_number_that_the_judge_replies(endpoint, tmp_path):
    endpoint.behave = lambda n, prompt: (200, f"Score: 0.{prompt[-1]}\n", {})
    text = 'task.judge.template="{question} {reference} {answer}"'
    task = task_of(typed(tmp_path, endpoint.url, text))
    assert rewards(task) == [0.0, 0.1, 0.2, 0.3]
    assert sorted(endpoint.prompts) == [f"q{n} a{n} says {n}" for n in range(4)]
    assert {body["temperature"] for body in endpoint.bodies} == {0}
    assert task.told() == {"judge": {"calls": 4, "kept": 0, "tried_again": 0}}


@pytest.mark.parametrize(
    ("reply", "said", "reward"),
    [
        ("number", "1", 1.0), ("number", " .25.", 0.25), ("number", "7/10", None),
        ("number", "1.5", None), ("number", "-0.5", None), ("number", "good", None),
        ("yes_no", "**Yes**, because", 1.0), ("yes_no", "No.", 0.0), ("yes_no", "Nothing", None),
        ("yes_no", "", None),
    ],
)  # fmt: skip
def test_what_a_reply_is_read_as(reply, said, reward, tmp_path):
    task = task_of(typed(tmp_path, "http://127.0.0.1:1/v1", f"task.judge.reply={reply}"))
    assert task.asked_judge.read(said) == reward


def test_the_same_content_is_paid_for_once(endpoint, tmp_path):
    """Within a batch, by a second task, and with a text that another template words the same."""
    overrides = typed(tmp_path, endpoint.url)
    first, second = task_of(overrides), task_of(overrides)
    assert rewards(first, ITEMS + ITEMS, OUTPUTS + OUTPUTS) == [0.5] * 8
    assert rewards(second) == [0.5] * 4
    assert len(endpoint.prompts) == 4
    assert second.told()["judge"] == {"calls": 0, "kept": 4, "tried_again": 0}
    assert rewards(task_of([*overrides, "task.judge.model=other"])) == [0.5] * 4
    assert len(endpoint.prompts) == 8, "of another model they aren't the same"


def _score(overrides: list[str]) -> list[float]:
    return rewards(task_of(overrides))


def test_processes_at_once_pay_once(endpoint, tmp_path):
    """Each call waits until all processes are at it."""
    task_of(overrides := typed(tmp_path, endpoint.url))
    endpoint.behave = lambda n, prompt: (
        (200, "0.5", {}) if endpoint.go_on.wait(60) else (500, "", {})
    )
    with multiprocessing.get_context("fork").Pool(3) as pool:
        asked = pool.map_async(_score, [overrides] * 3, chunksize=1)
        while len(endpoint.prompts) < 4:
            asked.wait(0.05)
        endpoint.go_on.set()
        assert asked.get(60) == [[0.5] * 4] * 3
    assert len(endpoint.prompts) == 4


def test_an_endpoint_that_is_busy_is_asked_again(endpoint, tmp_path):
    busy: Answer = (429, "slow down", {"Retry-After": "0"})
    endpoint.behave = lambda n, prompt: (
        busy if n == 1 else (503, "", {}) if n == 2 else (200, "1", {})
    )
    task = task_of(typed(tmp_path, endpoint.url))
    assert rewards(task, ITEMS[:1], OUTPUTS[:1]) == [1.0]
    assert task.told()["judge"] == {"calls": 3, "kept": 0, "tried_again": 2}
    assert len(endpoint.prompts) == 3


def test_an_endpoint_that_stays_busy_ends_it_after_the_tries(endpoint, tmp_path):
    endpoint.behave = lambda n, prompt: (503, "down for good", {})
    task = task_of(typed(tmp_path, endpoint.url))
    with pytest.raises(UserError, match=r"base_url=.*answered 503 \(down for good\); item id0"):
        rewards(task, ITEMS[:1], OUTPUTS[:1])
    assert len(endpoint.prompts) == 3


def test_nonsense_is_asked_for_again_and_then_named_with_its_item(endpoint, tmp_path):
    endpoint.behave = lambda n, prompt: (200, "lovely", {})
    task = task_of(typed(tmp_path, endpoint.url))
    with pytest.raises(
        UserError, match=r"no reply that can be read in 3 tries.*'lovely'.*item id2"
    ):
        rewards(task, ITEMS[2:3], OUTPUTS[2:3])
    assert len(endpoint.prompts) == 3
    endpoint.behave = lambda n, prompt: (200, "lovely" if n == 4 else "0.5", {})
    assert rewards(task, ITEMS[2:3], OUTPUTS[2:3]) == [0.5], "nonsense isn't kept"


@pytest.mark.parametrize("body", ["not json", '{"choices": []}', '{"error": "x"}', "[]"])
def test_what_is_no_such_endpoint_is_said(body, endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda made, of=json.dumps, **more: (
        body if isinstance(made, dict) and "choices" in made else of(made, **more)))  # fmt: skip
    task = task_of(typed(tmp_path, endpoint.url))
    with pytest.raises(UserError, match="none of an OpenAI-compatible endpoint"):
        rewards(task, ITEMS[:1], OUTPUTS[:1])


def test_a_slow_endpoint_ends_it_and_says_the_limit(endpoint, tmp_path):
    endpoint.behave = lambda n, prompt: (200, "1", {}) if endpoint.go_on.wait(60) else (500, "", {})
    task = task_of(typed(tmp_path, endpoint.url, "task.judge.timeout_seconds=.2"))
    with pytest.raises(UserError, match=r"can't be reached in 3 tries of 0\.2 s .*; item id0"):
        rewards(task, ITEMS[:1], OUTPUTS[:1])


def test_an_endpoint_that_is_away_ends_a_run_before_anything_is_loaded(tiny_files, tmp_path):
    with socket.socket() as taken:  # bound, and not listened at
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        model = [one for one in tiny_files.overrides() if not one.startswith("task")]
        overrides = [*model, *typed(tmp_path, url), "method=none", f"output_dir={tmp_path / 'out'}"]
        with pytest.raises(UserError, match=f"base_url={url}: can't be reached"):
            run_small(overrides)
    assert not list((tmp_path / "out").glob("*/*/result.json"))


def test_the_key_is_sent_and_told_to_nobody(endpoint, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JUDGES_KEY", KEY)
    endpoint.behave = lambda n, prompt: (401, f"bad key {KEY}", {})
    caplog.set_level(logging.DEBUG)
    overrides = typed(tmp_path, endpoint.url, "task.judge.api_key_from=JUDGES_KEY")
    with pytest.raises(UserError, match=r"refused the key in JUDGES_KEY \(401\)") as caught:
        rewards(task_of(overrides))
    endpoint.behave = lambda n, prompt: (400, f"bad key {KEY}", {})
    with pytest.raises(UserError, match=r"answered 400 \(bad key …\)") as other:
        rewards(task_of(overrides))
    endpoint.behave = lambda n, prompt: (200, "1", {})
    rewards(task_of(overrides))
    assert endpoint.keys == {f"Bearer {KEY}"}
    assert KEY not in str(caught.value) + str(other.value) + caplog.text
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert kept and not any(KEY in path.read_text() for path in kept)
    monkeypatch.delenv("JUDGES_KEY")
    with pytest.raises(UserError, match="api_key_from=JUDGES_KEY: there is no such environment"):
        task_of(overrides).splits()


def test_a_redirect_is_not_followed(endpoint, tmp_path):
    endpoint.behave = lambda n, prompt: (302, "", {"Location": "http://127.0.0.1:1/elsewhere"})
    with pytest.raises(UserError, match="answered 302"):
        rewards(task_of(typed(tmp_path, endpoint.url)))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task.judge.base_url=null", "task.judge.base_url=http://HOST:8000/v1"),
        ("task.judge.base_url=file:///etc", "must be the address of an endpoint"),
        ("task.judge.base_url='http://me:pw@host/v1'", "must hold no user, password"),
        ("task.judge.model=null", "set it to a model"),
        (f"task.judge.api_key_from={KEY}", "not the key"),
        ("task.judge.template=hello", "must hold {answer}"),
        ("task.judge.reply=numbr", "did you mean 'number'"),
        ("task.judge.tries=0", "must be at least 1"),
        ("task.shuffle_labels=true", r"put \{reference\} into task\.judge\.template"),
        ("task.judge.timeout_seconds=0", "must be over 0"),
    ],
)
def test_a_judge_that_cannot_be_asked_says_what_to_set(override, says, tmp_path):
    with pytest.raises(UserError, match=says) as caught:
        task_of(typed(tmp_path, "http://127.0.0.1:1/v1", override)).splits()
    assert KEY not in str(caught.value)


def test_a_line_without_a_field_of_the_template_is_named(endpoint, tmp_path):
    overrides = typed(tmp_path, endpoint.url, 'task.judge.template="{rubric} {answer}"')
    path = tmp_path / "own.jsonl"
    task_of(overrides).splits()
    path.write_text(path.read_text() + '{"question": "more"}\n')
    with pytest.raises(UserError, match=r"line 61: has no rubric, which task\.judge\.template"):
        task_of(overrides).splits()


def test_judges_that_are_not_asked_are_not_in_a_key(tmp_path):
    plain = ["task=jsonl", f"task.path={tmp_path}", "task.choices=[yes,no]"]
    assert run_key(quickly_composed(plain)) == run_key(
        quickly_composed([*plain, "task.judge.model=m"])
    )


def test_how_a_judge_is_asked_is_in_no_key(tmp_path):
    """More tries, or another variable for the key, go on with a run that failed."""
    asked = typed(tmp_path, "http://127.0.0.1:1/v1")
    more = ("tries=9", "timeout_seconds=5", "parallel=1", "wait_seconds=0", "api_key_from=MINE")
    plain, patient, other = (
        run_key(quickly_composed([*asked, *changes]))
        for changes in ([], [f"task.judge.{one}" for one in more], ["task.judge.model=another"])
    )
    assert plain == patient != other


def test_a_run_tells_what_its_judge_took(endpoint, tiny_files, tmp_path):
    model = [one for one in tiny_files.overrides() if not one.startswith("task")]
    overrides = [*model, *typed(tmp_path, endpoint.url), "method=none",
                 f"output_dir={tmp_path / 'out'}"]  # fmt: skip
    result, _ = run_small(overrides)
    told = result["notes"]["judge"]
    assert told["calls"] == len(endpoint.prompts) > 0
    assert result["scorer"].startswith(f"judge(m@{endpoint.url}, ")
    assert result["accuracy_baseline"] == 0.5 or result["reward_baseline"] == 0.5
