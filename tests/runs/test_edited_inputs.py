"""Files that are edited under the same path, between runs, before a resume, before a retry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from crl_exp.config.errors import UserError
from crl_exp.experiments import config as configs
from crl_exp.experiments.inputs import hub_commits, inputs_of
from crl_exp.experiments.run import run_experiment
from crl_exp.launcher.commands.retry import retry
from crl_exp.launcher.jobs import submit as submitting
from crl_exp.launcher.jobs.submit import Start, submit
from crl_exp.launcher.planning.plan import Point
from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.runs import inputs
from crl_exp.runs.directory import RunDirectory
from tests.helpers.launching import points_of, settings
from tests.helpers.tiny_run import TinyFiles, run_small, small

CHANGED = r"begun with something else in task\.path=.*digest \w+ then, \w+ now.*resume=force"


@pytest.fixture
def mine(tiny_files, tmp_path) -> TinyFiles:
    """Files of one's own: the task's and the SAEs' may be edited."""
    for name in ("task.jsonl", "saes"):
        source, there = tiny_files.root / name, tmp_path / name
        shutil.copytree(source, there) if source.is_dir() else shutil.copy(source, there)
    (tmp_path / "models").symlink_to(tiny_files.root / "models")
    return TinyFiles(tmp_path)


def typed(mine: TinyFiles, *more: str) -> list[str]:
    return [*mine.overrides(), f"output_dir={mine.root / 'out'}", "sweep_name=s", *more]


def edit(mine: TinyFiles) -> None:
    """One answer is another."""
    path = mine.root / "task.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    rows[0]["answer"] = {"yes": "no", "no": "yes"}[rows[0]["answer"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_finished_run_is_not_taken_for_one_of_other_data(mine):
    overrides = typed(mine, "method=none", "task.n_test=48")  # all 80 items are drawn
    first, path = run_small(overrides)
    assert run_small(overrides, skip_finished=True)[0] == json.loads(
        (path / "result.json").read_text()
    )
    task = mine.root / "task.jsonl"
    task.write_text(task.read_text() + "\n\n")
    run_small(overrides, skip_finished=True)  # the items are the same
    before = task.read_text()
    edit(mine)
    for skip_finished in (True, False):  # in a sweep, and typed alone
        with pytest.raises(UserError, match=CHANGED):
            run_small(overrides, skip_finished)
    (path / "inputs.json").unlink()  # of a version that didn't note it
    with pytest.raises(UserError, match=r"task\.path=.*items' digest \w+ then, \w+ now"):
        run_small(overrides, skip_finished=True)
    task.write_text(before)
    assert run_small(overrides, skip_finished=True)[0]["run_key"] == first["run_key"]
    edit(mine)
    again, _ = run_small([*overrides, "resume=force"])
    assert again["data_digest"] != first["data_digest"] and again["run_key"] == first["run_key"]
    assert run_small(overrides, skip_finished=True)[0]["data_digest"] == again["data_digest"]


def test_a_file_of_the_same_name_in_another_folder_is_another(mine, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(mine.root / "task.jsonl", tmp_path / name)
        edit(mine)
    overrides = typed(mine, "method=none", "task.n_test=48", "task.path=task.jsonl")
    monkeypatch.chdir(tmp_path / "a")
    run_small(overrides)
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(UserError, match=CHANGED):
        run_small(overrides, skip_finished=True)


class Killed(BaseException):
    """As a kill: nothing of the run sees it coming."""


def test_a_run_that_was_cut_off_does_not_go_on_with_other_data(mine, monkeypatch):
    overrides = typed(mine, "method=corrsteer_s", "task.n_test=48")
    with monkeypatch.context() as patch:
        patch.setattr("crl_exp.experiments.kinds.steering.evaluate", _kill)
        with pytest.raises(Killed):
            run_small(overrides)
    edit(mine)
    with pytest.raises(UserError, match=CHANGED):
        run_small(overrides)


def _kill(*_: object) -> None:
    raise Killed


def test_a_run_that_failed_on_its_file_takes_the_mended_one(mine):
    """It has read nothing that it would go on with."""
    overrides = typed(mine, "method=none")
    task = mine.root / "task.jsonl"
    good = task.read_text()
    task.write_text("no json\n" + good)
    with pytest.raises(UserError, match="line 1"):
        run_small(overrides)
    task.write_text(good)
    assert run_small(overrides)[0]["n"] == 16


def test_other_sae_weights_are_another_run(mine):
    overrides = typed(mine, "method=corrsteer_s", "layers.layer=1")
    run_small(overrides)
    other, here = (mine.root / "saes" / f"blocks.{n}.hook_resid_post" for n in (2, 1))
    shutil.copy(other / "sae_weights.safetensors", here / "sae_weights.safetensors")
    with pytest.raises(UserError, match=r"something else in sae\.folder=.*, layer 1 \(digest"):
        run_small(overrides, skip_finished=True)


def frozen(mine: TinyFiles, monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """A sweep of two, submitted; its workers never come to anything."""
    monkeypatch.setattr(submitting, "start_workers", lambda *_: [])
    points = points_of(
        *typed(mine, "+debug=tiny", "task=jsonl", "method=none", "layers.layer=1", "seed=0,1")
    )
    folder = points[0].run.path.parent
    folder.mkdir(parents=True)
    sweep = SweepFile.read(folder)
    submit([Start(point.run, settings("local_processes")) for point in points], sweep)
    return points


def test_a_queued_run_keeps_to_the_files_that_were_there(mine, monkeypatch):
    points = frozen(mine, monkeypatch)
    noted = json.loads((points[0].run.path / inputs.INPUTS).read_text())
    assert any(key.startswith("task.path=") for key in noted)
    edit(mine)
    with pytest.raises(UserError, match=CHANGED):
        run_experiment(points[0].config, skip_finished=True)
    whole = (mine.root / "task.jsonl").read_text()
    (mine.root / "task.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match=CHANGED):  # rather than what is wrong with the new one
        run_experiment(points[1].config, skip_finished=True)
    (mine.root / "task.jsonl").write_text(whole)
    with pytest.raises(UserError, match=rf"2 of 2 runs[\s\S]*{CHANGED}"):
        points_of(
            *typed(mine, "+debug=tiny", "task=jsonl", "method=none", "layers.layer=1", "seed=0,1")
        )


def test_retry_refuses_a_run_that_was_begun_with_other_files(mine, monkeypatch):
    points = frozen(mine, monkeypatch)
    run = points[0].run
    (run.path / inputs.DATA).write_text('{"digest": "0123", "n": {}}')
    for point in points:
        point.run.set_status("failed")
    edit(mine)
    with pytest.raises(UserError, match=rf"1 of 2 runs can't be submitted[\s\S]*{CHANGED}"):
        retry(run.path.parent, [])
    assert run.status()["state"] == "failed", "nothing was touched"


def edit_template(model: Path) -> None:
    path = model / "chat_template.jinja"
    path.write_text("w7 " + path.read_text())


def edit_weights(model: Path) -> None:
    """In the middle of the file, as training does; its size stays."""
    path = model / "model.safetensors"
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


@pytest.mark.parametrize("edit", [edit_template, edit_weights])
def test_another_model_in_the_same_folder_is_another_run(edit, mine):
    model = mine.root / "model"
    shutil.copytree(mine.root / "models" / "llama", model)
    overrides = typed(mine, f"model.path={model}", "method=none")
    first, path = run_small(overrides)
    assert run_small(overrides, skip_finished=True)[0]["run_key"] == first["run_key"]
    noted = json.loads((path / inputs.INPUTS).read_text())
    assert f"model.path={model}" in noted
    edit(model)
    for skip_finished in (True, False):
        with pytest.raises(UserError, match=r"begun with something else in model\.path=.*resume=f"):
            run_small(overrides, skip_finished)
    del noted[f"model.path={model}"]  # of a version that didn't note it
    (path / inputs.INPUTS).write_text(json.dumps(noted))
    assert run_small(overrides, skip_finished=True)[0]["run_key"] == first["run_key"]


def test_models_that_are_made_or_fetched_by_name_are_not_looked_at(tmp_path, monkeypatch):
    """An asset needn't even be there; a folder of that name isn't one."""
    monkeypatch.chdir(tmp_path)
    for path in ("tiny:llama", "asset:models/smollm2"):
        (tmp_path / path).mkdir(parents=True)
        exp = configs.experiment(small([f"model.path={path}", "method=none"]))
        assert not any(key.startswith("model.path") for key in inputs_of(exp, []))


def test_a_group_of_ones_own_file_that_was_edited_is_told(mine):
    """No score hangs on it, but the tables by group do."""
    task = mine.root / "task.jsonl"
    plain = task.read_text()
    rows = [json.loads(line) for line in plain.splitlines()]

    def write(groups: list[str]) -> None:
        grouped = [row | {"group": g} for row, g in zip(rows, groups, strict=True) if g]
        task.write_text("".join(json.dumps(row) + "\n" for row in grouped or rows))

    groups = ["a", "b"] * 40
    write(groups)
    overrides = typed(mine, "method=none", "task.n_test=48")
    _, path = run_small(overrides)
    assert "groups" in json.loads((path / inputs.DATA).read_text())
    task.write_text(task.read_text() + "\n")
    assert run_small(overrides, skip_finished=True)[0], "a blank line more"
    for others in (["b", "a"] * 40, [""] * 80):
        write(others)
        with pytest.raises(UserError, match=CHANGED):
            run_small(overrides, skip_finished=True)
    write(groups)
    assert run_small(overrides, skip_finished=True)[0]


def test_items_in_no_groups_have_no_digest_of_them(mine):
    _, path = run_small(typed(mine, "method=none"))
    assert "groups" not in json.loads((path / inputs.DATA).read_text())


def test_keys_are_what_they_were(mine):
    """They need no file to be read."""
    config = small(typed(mine, "method=none"))
    key = RunDirectory(config).key
    edit(mine)
    assert RunDirectory(config).key == key


def test_a_list_of_features_may_be_edited(mine):
    """Its run is not gone on with, nor its result taken, for another list."""
    path = mine.root / "list.csv"
    path.write_text("layer,feature,coefficient\n1,3,2.0\n")
    listed = ["method=listed", f"method.path={path}", "layers=single"]
    run_small(typed(mine, *listed))
    assert run_small(typed(mine, *listed), skip_finished=True)[0]
    path.write_text("layer,feature,coefficient\n1,4,2.0\n")
    with pytest.raises(
        UserError, match=r"begun with something else in method\.path=.*resume=force"
    ):
        run_small(typed(mine, *listed), skip_finished=True)


def test_a_digest_is_of_the_content(tmp_path: Path):
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
    a, b, c = (inputs.digest([tmp_path / name], "task.path") for name in "abc")
    assert a == b != c
    with pytest.raises(UserError, match="is no file"):
        inputs.digest([Path("/dev/zero")], "task.path")


def test_the_hubs_commits_are_those_that_its_local_cache_holds(tmp_path, monkeypatch):
    """Without a look at the network; what the cache doesn't hold, and folders, are left out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commits = {"models--google--gemma-scope-2b-pt-res": "a" * 40, "datasets--cais--mmlu": "b" * 40}
    for name, commit in commits.items():
        (tmp_path / name / "refs").mkdir(parents=True)
        (tmp_path / name / "refs" / "main").write_text(commit)
    chosen = ["model=gemma2_2b_it", "sae=gemma_scope_2b_res", "task=mmlu", "layers.layer=12"]
    data, release = "task.hub_id=cais/mmlu", "sae.release=gemma-scope-2b-pt-res-canonical"

    def found(*more: str) -> dict[str, str]:
        return hub_commits(configs.experiment(small([*chosen, *more])), [12])

    assert found() == {release: "a" * 40, data: "b" * 40}
    assert found("model.revision=" + "c" * 40)["model.path=google/gemma-2-2b-it"] == "c" * 40
    assert found("task.revision=other") == {release: "a" * 40}, "another than the cache holds"
    assert found("task.data_files=mine.jsonl") == {release: "a" * 40}
    tiny = configs.experiment(small(["+debug=tiny"]))
    assert hub_commits(tiny, [12]) == {}
