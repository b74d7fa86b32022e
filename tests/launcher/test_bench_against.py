"""`bench --against COMMIT`, `--keep` and `--history`: two codes in turn, and what was kept."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest

from crl_exp.config.errors import UserError
from crl_exp.launcher.bench import against, history
from crl_exp.launcher.bench import command as bench

# A bench of another size: it has the rows that are named, and takes the seconds that it is given.
STAND_IN = """
import json, sys
rows, seconds = {rows!r}, {seconds!r}
if "--list" in sys.argv:
    print(*[f"{{row}}   what it is" for row in rows], sep="\\n")
    sys.exit()
if {broken!r}:
    sys.exit("it broke")
asked = sys.argv[sys.argv.index("--only") + 1 : sys.argv.index("--out")]
figures = [
    {{"name": row, "seconds_top": seconds, "seconds_bottom": 1.0}} for row in asked if row in rows
]
with open({log!r}, "a") as log:
    log.write({mark!r})
told = {{"figures": figures, "left_out": {{}}}}
open(sys.argv[sys.argv.index("--out") + 1], "w").write(json.dumps(told))
"""
BOTH = ["startup_help", "startup_job", "startup_typo"]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout whose code is faster than its first commit's, which has a row less."""
    folder, log = tmp_path / "repository", tmp_path / "log"
    package = folder / "crl_exp"
    package.mkdir(parents=True)

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)

    def write(rows, seconds, mark, broken=False) -> None:
        text = STAND_IN.format(rows=rows, seconds=seconds, mark=mark, log=str(log), broken=broken)
        (package / "__main__.py").write_text(text)

    git("init", "-q")
    write(BOTH[:2], 8.0, "then ")
    git("add", ".")
    git("commit", "-q", "-m", "slow")
    write(BOTH, 2.0, "now ")
    monkeypatch.setattr(against, "REPO", folder)
    return SimpleNamespace(write=write, log=log, folder=folder)


def test_another_commit_is_measured_in_turn_and_rows_that_it_lacks_are_told(
    repository, tmp_path, capsys
) -> None:
    out = tmp_path / "bench.json"
    argv = ["--against", "HEAD", "--only", "startup", "--rounds", "2", "--out", str(out)]
    assert bench.main(argv) == 0
    told = json.loads(out.read_text())
    found = {(one["row"], one["side"]): one for one in told["versus"]}
    assert set(found) == {
        (row, side)
        for row, top in (("startup_help", "help"), ("startup_job", "job"))
        for side in (top, "hydra")
    }
    one = found["startup_help", "help"]
    assert (one["median"], one["now"], one["then"], one["rounds"]) == (0.25, 2.0, 8.0, 2)
    assert found["startup_help", "hydra"]["median"] == 1.0
    assert repository.log.read_text().split() == ["then", "now", "now", "then"]
    assert "has no such row" in told["left_out"]["startup_typo"]
    assert "left out: startup_typo" in capsys.readouterr().err
    kept = subprocess.run(
        ["git", "worktree", "list"], cwd=repository.folder, capture_output=True, text=True
    )
    assert len(kept.stdout.splitlines()) == 1, "git keeps nothing of the other code"


def test_a_bench_that_fails_ends_it_with_what_it_said(repository, capsys) -> None:
    repository.write(BOTH, 2.0, "now ", broken=True)
    assert bench.main(["--against", "HEAD", "--only", "startup"]) == 1
    assert "it broke" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--against", "nowhere"], "--against=nowhere: no such commit"),
        (["--against", "HEAD", "--only", "update"], "it has none of these rows"),
        (["--against", "HEAD", "--rounds", "0"], "--rounds=0: must be at least 1"),
        (["--against", "HEAD", "--keep"], "leave it out with --against"),
    ],
)
def test_what_cannot_be_compared_is_told(repository, argv, why, capsys) -> None:
    assert bench.main(argv) == 1
    assert why in capsys.readouterr().err


def test_what_was_kept_is_printed_with_the_oldest_first(tmp_path, monkeypatch) -> None:
    for date, commit, median in ((2e9, "b" * 40, 3.25), (1e9, "a" * 40, 4.5)):
        told = {
            "started": date, "git_commit": commit, "subject": "tiny", "machine": "a machine",
            "figures": [{"name": "pack", "goal": "≤ 3", "median": median}],
        }  # fmt: skip
        (tmp_path / f"{commit}.json").write_text(json.dumps(told))
    table = history.table(history.measurements(tmp_path))
    heads = [str(column.header) for column in table.columns]
    assert heads[2].startswith("2001-09-09\naaaaaaaaa\n") and heads[3].startswith("2033-05-18\nb")
    assert [next(iter(column.cells)) for column in table.columns] == ["pack", "≤ 3", "4.5", "3.25"]
    with pytest.raises(UserError, match="bench --keep writes one"):
        history.measurements(tmp_path / "empty")


def test_a_measurement_of_changed_code_is_not_kept(monkeypatch, capsys) -> None:
    for commit, dirty in (("a" * 40, True), (None, None)):
        state = SimpleNamespace(commit=commit, dirty=dirty)
        monkeypatch.setattr(history, "code_state", lambda state=state: state)
        assert bench.main(["--keep", "--only", "startup_typo"]) == 1
        assert "commit it first" in capsys.readouterr().err
    state = SimpleNamespace(commit="a" * 40, dirty=False)
    monkeypatch.setattr(history, "code_state", lambda: state)
    assert history.place(1e9).name == "2001-09-09_aaaaaaaaa.json"
