"""Neuronpedia's labels: fetched from a real server of the bucket's layout, shown in a report."""

from __future__ import annotations

import csv
import gzip
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest

from crl_exp.config.errors import UserError
from crl_exp.launcher.assets.feature_labels import MIRROR, fetch_labels
from crl_exp.report.command import main
from crl_exp.report.feature_labels import JUDGED, kept_at, label_of, labels_of
from tests.helpers.synthetic import config, finished_run
from tests.report.test_report_features import LINK, with_features, with_interventions

SOURCE = "tiny/18-res"


def lines(*pairs: tuple[int, str]) -> bytes:
    rows = [{"modelId": "tiny", "index": str(at), "description": text} for at, text in pairs]
    return gzip.compress("\n".join(map(json.dumps, rows)).encode())


@contextmanager
def bucket(files: dict[str, bytes], page: int = 1):
    """Lists `page` names at a time, as S3 does; gives 404 for what isn't there."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            query = parse_qs(urlparse(self.path).query)
            if "prefix" in query:
                names = sorted(name for name in files if name.startswith(query["prefix"][0]))
                at = int(query.get("continuation-token", ["0"])[0])
                rows = "".join(
                    f"<Contents><Key>{n}</Key></Contents>" for n in names[at : at + page]
                )
                more = f"<NextContinuationToken>{at + page}</NextContinuationToken>"
                body = (
                    '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                    f"{rows}{more if at + page < len(names) else ''}</ListBucketResult>"
                ).encode()
            else:
                body = files.get(self.path.lstrip("/"), b"")
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))


def test_all_files_of_an_export_are_fetched_once(monkeypatch):
    files = {
        f"v1/{SOURCE}/explanations-other/batch-0.jsonl.gz": lines((9, "of another model")),
        f"v1/{SOURCE}/explanations/batch-0.jsonl.gz": lines((9, " praise\n of a film"), (2, "")),
        f"v1/{SOURCE}/explanations/batch-1.jsonl.gz": lines((12, "dates"), (9, "a second one")),
    }
    with bucket(files) as (address, asked):
        monkeypatch.setenv(MIRROR, address)
        assert fetch_labels(SOURCE) == 2
        assert labels_of(SOURCE) == {"9": "praise of a film", "12": "dates"}
        before = len(asked)
        assert fetch_labels(SOURCE) == 2 and len(asked) == before
    assert label_of(LINK) == "praise of a film"
    assert label_of(LINK[:-1] + "2") is None and label_of(None) is None
    assert label_of("https://example.org/tiny/18-res/9") is None


def test_what_is_not_there_is_told_and_leaves_nothing(monkeypatch):
    with bucket({}) as (address, _):
        monkeypatch.setenv(MIRROR, address)
        with pytest.raises(UserError, match="no explanations of tiny/18-res"):
            fetch_labels(SOURCE)
    with pytest.raises(UserError, match=f"{address}.*runs need no labels"):
        fetch_labels(SOURCE)  # the server is gone
    monkeypatch.setenv(MIRROR, "file:///etc")
    with pytest.raises(UserError, match=f"{MIRROR}=file:///etc: must be an address"):
        fetch_labels(SOURCE)
    assert not kept_at(SOURCE).parent.exists()
    with pytest.raises(UserError, match="no source of Neuronpedia"):
        fetch_labels("../../x")


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b'{"description": "x"}\n'), gzip.compress(b"no json\n")],
    ids=["no gzip", "no index", "no json"],
)
def test_an_export_that_cannot_be_read_is_told_and_leaves_nothing(monkeypatch, content):
    with bucket({f"v1/{SOURCE}/explanations/batch-0.jsonl.gz": content}) as (address, _):
        monkeypatch.setenv(MIRROR, address)
        with pytest.raises(UserError, match=r"export of tiny/18-res can't be read"):
            fetch_labels(SOURCE)
    assert not kept_at(SOURCE).exists()


def test_a_report_shows_labels_where_there_are_some(tmp_path, quick_reports):
    with_interventions(with_features(finished_run(config(tmp_path), 0.1, steps=20)))
    folder = tmp_path / "demo" / "report"
    assert main([str(tmp_path / "demo")]) == 0
    assert "label" not in (folder / "features.csv").read_text()
    path = kept_at(SOURCE)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"labels": {"9": "a [b] | <i>c</i>"}}))
    assert main([str(tmp_path / "demo")]) == 0
    found = {
        line["feature"]: line["label"] for line in csv.DictReader((folder / "features.csv").open())
    }
    assert found == {"9": "a [b] | <i>c</i>", "2": ""}
    assert f"[18/9]({LINK}) a [b] \\| &lt;i>c&lt;/i>" in (folder / "table.md").read_text()
    assert "18/9 a [b] | &lt;i&gt;c&lt;/i&gt;" in (folder / "report.html").read_text()
    path.write_text("{")
    with pytest.raises(UserError, match=r"18-res\.json is damaged .* remove it"):
        label_of(LINK)


def test_a_report_shows_a_judges_label_with_its_score(tmp_path, quick_reports):
    run = with_interventions(with_features(finished_run(config(tmp_path), 0.1, steps=20)))
    one = {"label": "praise", "model": "m", "balanced_accuracy": 0.85, "interval": [0.64, 0.95],
           "n": 20}  # fmt: skip
    (run.path / JUDGED).write_text(json.dumps({"18/2": one}))
    assert main([str(tmp_path / "demo")]) == 0
    lines = csv.DictReader((tmp_path / "demo" / "report" / "features.csv").open())
    told = "praise (by m; detection 0.85 [0.64, 0.95], n 20, chance .5)"
    assert {line["feature"]: line["label"] for line in lines} == {"9": "", "2": told}
    (run.path / JUDGED).write_text("{")
    with pytest.raises(UserError, match=r"feature_labels\.json is damaged .* remove it"):
        main([str(tmp_path / "demo")])
