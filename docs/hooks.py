"""What MkDocs can't do by itself for `make docs`: pages from outside of docs/, the tutorial, the
list of options, the API, equations that no script has to draw. A test builds it strictly.

Links in the sources are those that work on GitHub; here they are turned to where the page is.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import crl_exp

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "assets/smollm2_saes/README.md": "saes.md",
}
"""Pages from outside of docs/, by their path in the checkout, and what they are here."""
NOTEBOOK, TUTORIAL, REFERENCE = "tutorial.ipynb", "tutorial.md", "reference.md"
FENCE = re.compile(r"^( *```\w+) ([\w./]+)$", re.M)
"""A block that says which file it is."""
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)]*)?\))")
MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
ITEM = re.compile(r"( *)(?:[-*]|\d+\.) ")
ENTITIES = (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    pages = sorted(Path(config.docs_dir).glob("options/*.md"))
    for part in config.nav or []:
        if "Options" in part:
            part["Options"] += [{path.stem: f"options/{path.name}"} for path in pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {here: (ROOT / there).read_text(encoding="utf-8") for there, here in OUTSIDE.items()}
    made[TUTORIAL] = notebook((ROOT / "docs" / NOTEBOOK).read_text(encoding="utf-8"))
    made[REFERENCE] = reference()
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    there = {here: source for source, here in OUTSIDE.items()}
    source = there.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = posixpath.dirname(source)
    here = posixpath.dirname(page.file.src_uri)

    def turned(link: re.Match[str]) -> str:
        before, target, after = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        path = OUTSIDE.get(path, path.removeprefix("docs/"))
        path = TUTORIAL if path == NOTEBOOK else path
        return before + posixpath.relpath(path, here or ".") + after

    markdown = FENCE.sub(r'\1 title="\2"', markdown)
    return nested_by_four(outside_of_code(markdown, lambda text: LINK.sub(turned, text)))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return MATH.sub(_mathml, html)


def outside_of_code(markdown: str, change: Any) -> str:
    """The text with what stands in no fenced block changed."""
    parts = re.split(r"(^ *```.*?^ *```[^\n]*$)", markdown, flags=re.M | re.S)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def nested_by_four(markdown: str) -> str:
    """Lists as Python-Markdown wants them, where on GitHub two or three blanks are enough: what is
    inside of an item four blanks in for each level, and a blank line before the first item."""
    lines: list[str] = []
    in_list, fence, shift = False, False, 0
    loose = False  # whether the item has a part behind a blank line, and so needs one behind it
    for line in markdown.split("\n"):
        indent = len(line) - len(line.lstrip())
        if fence:
            fence = not line.lstrip().startswith("```")
        else:
            item = ITEM.match(line)
            if item and (loose or not in_list) and lines and lines[-1].strip():
                lines.append("")
            loose = not item and in_list and (loose or not line.strip())
            in_list = bool(item or (in_list and (indent > 1 or not line.strip())))
            shift = 4 * (indent // 2) - indent if in_list else 0
            fence = line.lstrip().startswith("```")
        lines.append(" " * shift + line if line.strip() else line)
    return "\n".join(lines)


def _mathml(found: re.Match[str]) -> str:
    _, bracket, latex = found.groups()
    for entity, character in ENTITIES:
        latex = latex.replace(entity, character)
    return convert(latex.strip(), display="inline" if bracket == "(" else "block")


def notebook(text: str) -> str:
    """A notebook as Markdown: its texts, its code, and what that printed where that is kept."""
    cells = json.loads(text)["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            printed = output.get("text") or data.get("text/plain")
            if "image/png" in data:
                parts.append(f"![](data:image/png;base64,{data['image/png'].strip()})")
            elif printed:
                parts.append(f"```text\n{''.join(printed).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def reference() -> str:
    """A page of what `import crl_exp` gives, in full: signatures and docstrings."""
    parts = [
        "# Reference\n",
        "What `import crl_exp` gives; [From Python](api.md) shows all of it in use. Docstrings "
        "stand as they are in the code.\n",
    ]
    for name, home in crl_exp._HOMES.items():
        parts.append(f"::: {home}.{name}\n")
    return "\n".join(parts)
