"""Which code a run was made by, where it lies inside of a repository that isn't ours."""

from __future__ import annotations

import json
import subprocess

from crl_exp.runs.code_state import BUILT_FROM, CodeState, built_from, read_code_state


def test_an_unpacked_copy_says_nothing_of_the_users_repository(tmp_path):
    """Its commit would pass for ours, and its changes would be written beside the runs."""
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "mine.txt").write_text("mine\n")
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "mine"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (tmp_path / "mine.txt").write_text("changed\n")
    copy = tmp_path / "crl_exp-1"
    (copy / "conf").mkdir(parents=True)
    (copy / "conf" / "a.yaml").write_text("a: 1\n")
    assert read_code_state(copy) == CodeState(None, None, "")
    subprocess.run(["git", "-C", str(tmp_path), "add", "crl_exp-1"], check=True)
    assert read_code_state(copy).commit is not None, "a part of the repository that git knows"


def test_a_wheel_says_what_it_was_made_from(tmp_path):
    assert built_from(tmp_path) == CodeState(None, None, "")
    (tmp_path / BUILT_FROM).write_text(json.dumps({"git_commit": "c0ffee", "git_dirty": True}))
    assert built_from(tmp_path).facts == {
        "git_commit": "c0ffee", "git_dirty": True, "git_diff": None,
    }  # fmt: skip
