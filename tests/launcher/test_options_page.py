"""docs/options.md is made from `conf/` and says what is there."""

from __future__ import annotations

from pathlib import Path

from crl_exp.config.paths import REPO
from crl_exp.launcher.commands.options import CONF, LEFT_OUT, PAGE, Option, groups, page

STAGES = ("fusion", "activation", "noise", "mask")


def test_the_page_is_not_stale():
    assert PAGE.read_text() == page(), "run `python -m crl_exp options`"


def test_every_option_is_there():
    written = page()
    for path in CONF.glob("*/*.yaml"):
        if path.parent.name not in LEFT_OUT:
            section = written.split(f"## {path.parent.name}\n")[1].split("\n## ")[0]
            assert f"| {path.stem} |" in section or f"| **{path.stem}** |" in section, path


def says_where_from(option: Option) -> bool:
    plain = option.name in ("none", "identity")
    return plain or (option.source != "–" and option.reported != "–")


def test_every_stage_has_a_source_and_what_was_reported():
    for group in STAGES:
        for option in groups(CONF)[group]:
            assert says_where_from(option), option


def test_values_are_as_they_are_typed():
    (simpleqa,) = [option for option in groups(CONF)["task"] if option.name == "simpleqa"]
    for value in (
        'stop=["\\n"]', 'question_template="Question: {question}\\nAnswer:"', "revision=null",
        "sources={train: test, validation: test, test: test}", "threshold=0.6",
    ):  # fmt: skip
        assert value in simpleqa.values


def test_every_sweep_is_listed_by_what_it_asks():
    page = (REPO / "docs" / "sweeps.md").read_text()
    for path in (REPO / "sweeps").glob("*.yaml"):
        asks = path.read_text().splitlines()[1].lstrip("# ")
        assert f"| `{path.stem}` | {asks} |" in page, path


def test_a_changed_value_and_a_changed_line_show(tmp_path):
    copied = tmp_path / "conf"
    for path in (*CONF.glob("fusion/*.yaml"), CONF / "config.yaml"):
        target = copied / path.relative_to(CONF)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    before = page(copied)
    assert "**add**" in before and "weight=1.0" in before
    add = copied / "fusion" / "add.yaml"
    add.write_text(add.read_text().replace("weight: 1.0", "weight: 7.5"))
    assert "weight=7.5" in page(copied) and page(copied) != before
    head = "# A new one.\n# source: X; reported: y\n"
    new = f"{head}_target_: crl_exp.steering.stages.fusion.Multiply\n"
    (copied / "fusion" / "new.yaml").write_text(new)
    assert "| new | A new one. | – | X | y |" in page(copied)
    assert Path(PAGE).exists()
