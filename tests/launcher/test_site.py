"""The docs as a site: built strictly, without anything from elsewhere, every page in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_run import ROOT

SCRIPT_OR_STYLE = re.compile(
    r'(?:<script[^>]*src|<link[^>]*rel="stylesheet"[^>]*href)="(http[^"]*)"'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. `--strict` fails on a broken link, anchor, or a page that no menu has."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def page(site: Path, name: str) -> str:
    return (site / name).read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_page_of_the_docs_is_there(site):
    for path in (ROOT / "docs").rglob("*.md"):
        assert (site / path.relative_to(ROOT / "docs")).with_suffix(".html").exists(), path
    for name in ("index", "changelog", "contributing", "saes", "tutorial", "reference"):
        assert (site / f"{name}.html").exists()


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert SCRIPT_OR_STYLE.findall(path.read_text(encoding="utf-8")) == [], path


@pytest.mark.slow
def test_the_reference_has_every_name_with_its_docstring(site):
    import crl_exp

    text = page(site, "reference.html")
    for name, home in crl_exp._HOMES.items():
        assert f'id="{home}.{name}"' in text
    assert "Run a composed experiment in its run directory" in text


@pytest.mark.slow
def test_equations_lists_and_titles_come_out(site):
    method = page(site, "method.html")
    assert method.count("<math") > 20 and "arithmatex" not in method
    assert '<span class="filename">crl_exp/tasks/parity.py</span>' in page(site, "extending.html")
    broken = re.compile(r"^(?:- |\| )", re.M)  # a list or a table that was taken for a paragraph
    for path in site.rglob("*.html"):
        prose = re.sub(r"<pre.*?</pre>", "", path.read_text(encoding="utf-8"), flags=re.S)
        assert not broken.search(prose), path


@pytest.mark.slow
def test_the_tutorial_shows_what_came_out(site):
    text = page(site, "tutorial.html")
    assert "data:image/png;base64," in text and "load_run" in text


def test_the_picture_is_drawn_by_its_script(tmp_path):
    target = tmp_path / "drawn.png"
    script = ROOT / "docs" / "figures" / "token_by_layer.py"
    subprocess.run([sys.executable, script, target], check=True, cwd=ROOT)
    assert target.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert script.with_suffix(".png").exists()
