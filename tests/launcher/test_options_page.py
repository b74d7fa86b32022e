"""docs/options.md and its pages are made from `conf/` and say what is there."""

from __future__ import annotations

from crl_exp.config.paths import REPO
from crl_exp.launcher.commands.option_pages import CONF, INDEX, LEFT_OUT, Option, groups, pages
from crl_exp.launcher.commands.options import stale, write

STAGES = ("fusion", "activation", "noise", "mask")


def test_no_page_is_stale():
    assert stale(pages()) == [], "run `python -m crl_exp options`"


def test_every_option_is_there():
    written = pages()
    for path in CONF.glob("*/*.yaml"):
        group, name = path.parent.name, path.stem
        if group not in LEFT_OUT:
            page = written[f"options/{group}.md"]
            assert f"| {name} |" in page or f"| **{name}** |" in page, path
            assert f"`{group}={name}`" in page, path
            section = written[INDEX].split(f"## {group}\n")[1].split("\n## ")[0]
            names = section.split("\n\n")[1].strip().replace("**", "").replace("\n", " ")
            assert name in names.split(", "), path


def test_the_index_keeps_the_anchors_and_links_every_page():
    written = pages()
    for group in groups(CONF):
        assert f"\n## {group}\n" in written[INDEX]
        assert f"(options/{group}.md)" in written[INDEX] and f"options/{group}.md" in written


def test_no_line_is_too_long_to_read():
    for name, text in pages().items():
        assert [line for line in text.splitlines() if len(line) > 200] == [], name


def test_a_docstring_stands_once_on_its_page():
    page = pages()["options/task.md"]
    assert page.count("Base of all tasks.") == 1
    assert "## All of them\n\nBase of all tasks." in page
    assert "- `n_train`, `n_validation`, `n_test`: items drawn for each split" in page


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
        assert f"\n{value}\n" in pages()["options/task.md"]


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

    def page() -> str:
        return pages(copied)["options/fusion.md"]

    before = page()
    assert "**add**" in before and "weight=1.0" in before
    add = copied / "fusion" / "add.yaml"
    add.write_text(add.read_text().replace("weight: 1.0", "weight: 7.5"))
    assert "weight=7.5" in page() and page() != before
    head = "# A new one.\n# source: X; reported: y\n"
    new = f"{head}_target_: crl_exp.steering.stages.fusion.Multiply\n"
    (copied / "fusion" / "new.yaml").write_text(new)
    assert "| new | A new one. | X | y |" in page()
    assert "multiply, new" in page()


def test_a_changed_page_is_stale_and_one_that_nothing_has_any_more_goes(tmp_path):
    written = {"options.md": "index\n", "options/task.md": "task\n"}
    assert len(write(written, tmp_path)) == 2 and stale(written, tmp_path) == []
    gone, changed = tmp_path / "options" / "gone.md", tmp_path / "options" / "task.md"
    gone.write_text("of a group that was removed\n")
    changed.write_text("edited by hand\n")
    assert stale(written, tmp_path) == [changed, gone]
    write(written, tmp_path)
    assert not gone.exists() and changed.read_text() == "task\n"
