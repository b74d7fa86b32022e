"""How the runs of a pack end: done, failed, cancelled, interrupted, saved, left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading

import pytest

from crl_exp.config.errors import UserError
from crl_exp.experiments.packing import run_pack
from crl_exp.experiments.run import run_experiment
from crl_exp.experiments.turns import Pack
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.preemption import Preempted
from crl_exp.steering.policy.learner import NonFiniteError
from tests.experiments.test_packing import close, configs, forget, told


def test_a_run_that_fails_ends_alone(tiny_files, tmp_path) -> None:
    """A loss that isn't finite, and a setting that can't work."""
    variants = [
        ["seed=0"],
        ["algorithm.lr_policy=1e9", "algorithm.weight_decay=1e9"],
        ["warmup.min_frequency=0.999999"],
    ]
    solo = configs(tiny_files, tmp_path / "solo", variants[:1])
    run_experiment(solo[0], skip_finished=False)
    packed = configs(tiny_files, tmp_path / "packed", variants)
    good, loss, none_left = run_pack(packed)
    assert isinstance(loss, NonFiniteError)
    assert isinstance(none_left, UserError) and "min_frequency" in str(none_left)
    assert isinstance(good, dict)
    close(told(RunDirectory(packed[0]).path), told(RunDirectory(solo[0]).path))
    states = []
    for config in packed:
        status = json.loads((RunDirectory(config).path / "status.json").read_text())
        states.append(status["state"])
        assert bool(status["traceback"]) == (status["state"] == "failed")
    assert states == ["done", "failed", "failed"]


def test_a_pack_goes_on_from_checkpoints_and_skips_what_is_done(tiny_files, tmp_path) -> None:
    variants = [["seed=0"], ["seed=1"]]
    whole = configs(tiny_files, tmp_path / "whole", variants)
    run_pack(whole)
    broken = configs(tiny_files, tmp_path / "broken", variants, "checkpoint.updates=2")
    run_pack(broken)
    first, second = (RunDirectory(config).path for config in broken)
    for name in ("result.json", "checkpoint.pt"):
        (second / name).unlink()  # it goes on from the checkpoint before, of the second update
    before = (first / "result.json").stat().st_mtime_ns
    run_pack(broken)
    assert (first / "result.json").stat().st_mtime_ns == before
    close(told(second), told(RunDirectory(whole[1]).path))


def test_an_interrupt_ends_all_runs_and_is_recorded(tiny_files, tmp_path, monkeypatch) -> None:
    packed = configs(tiny_files, tmp_path, [["seed=0"], ["seed=1"]])
    together = Pack._together
    rounds: list[int] = []

    def interrupted(self, alike):
        rounds.append(len(alike))
        if len(rounds) == 3:
            raise KeyboardInterrupt
        together(self, alike)

    monkeypatch.setattr(Pack, "_together", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_pack(packed)
    for config in packed:
        folder = RunDirectory(config).path
        assert json.loads((folder / "status.json").read_text())["state"] == "cancelled"
        assert (folder / "journal.jsonl").exists() and not (folder / "result.json").exists()
    assert not [t for t in threading.enumerate() if t.name.startswith("run ")]


def test_a_run_that_is_left_alone_has_ended_too(tiny_files, tmp_path) -> None:
    """resume=retry leaves what was never started; the other of the pack isn't kept waiting."""
    left, done = configs(tiny_files, tmp_path, [["seed=0"], ["seed=1"]])
    left.resume = "retry"
    first, second = run_pack([left, done])
    assert first is None and isinstance(second, dict)
    assert not (RunDirectory(left).path / "status.json").exists()


def test_a_pack_that_is_asked_to_end_is_saved_and_goes_on(tiny_files, tmp_path) -> None:
    variants = [["seed=0"], ["seed=1"]]
    straight, warned = (configs(tiny_files, tmp_path / name, variants) for name in "ab")
    run_pack(straight)
    asked: list[int] = []

    def at_its_second_update(self, step: int, metrics) -> None:
        if step == 2 and not asked:
            asked.append(step)
            os.kill(os.getpid(), signal.SIGUSR2)
        log(self, step, metrics)

    log = RunDirectory.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "log", at_its_second_update)
        with pytest.raises(Preempted):
            run_pack(warned)
    for config in warned:
        run = RunDirectory(config)
        assert run.status()["state"] == "preempted" and run.load_checkpoint() is not None
    run_pack(warned)
    for one, other in zip(straight, warned, strict=True):
        close(told(RunDirectory(other).path), told(RunDirectory(one).path))


def test_one_that_is_cancelled_ends_alone_and_goes_on_later(tiny_files, tmp_path) -> None:
    """It is saved after its step; whoever ran the pack isn't told to end."""
    variants = [["seed=0"], ["seed=1"]]
    straight, cut = (configs(tiny_files, tmp_path / name, variants) for name in "ab")
    run_pack(straight)
    first = RunDirectory(cut[0])
    log = RunDirectory.log

    def cancelled_at_its_second_update(self, step: int, metrics) -> None:
        if step == 2 and self.key == first.key:
            self.cancel_path.touch()
        log(self, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "log", cancelled_at_its_second_update)
        cancelled, done = run_pack(cut)
    assert isinstance(cancelled, Preempted) and cancelled.cancelled and isinstance(done, dict)
    assert first.status()["state"] == "cancelled" and first.load_checkpoint() is not None
    assert RunDirectory(cut[1]).status()["state"] == "done"
    again = run_pack(cut[:1])
    assert isinstance(again[0], dict) and again[0]["packed"] == 2, "its time was shared once"
    for one, other in zip(straight, cut, strict=True):
        close(told(RunDirectory(other).path), told(RunDirectory(one).path))


def test_one_that_another_process_has_is_left_alone(tiny_files, tmp_path) -> None:
    held, free = configs(tiny_files, tmp_path, [["seed=0"], ["seed=1"]])
    with RunDirectory(held).held():
        first, second = run_pack([held, free])
    assert first is None and isinstance(second, dict)
    assert not (RunDirectory(held).path / "status.json").exists()


def test_a_warmup_that_cannot_be_shared_is_made_by_each(tiny_files, tmp_path, caplog) -> None:
    """The SAE of one run's layer can't be loaded: that run fails, the other warms up by itself."""
    folder = tmp_path / "saes"
    shutil.copytree(tiny_files.root / "saes", folder)
    next((folder / "blocks.2.hook_resid_post").glob("*.safetensors")).unlink()
    more = [f"sae.folder={folder}", f"sae.name={tmp_path.name}"]
    variants = [["layers.layer=1"], ["layers.layer=2"]]
    forget()
    good, bad = run_pack(configs(tiny_files, tmp_path / "out", variants, *more))
    assert isinstance(good, dict)
    assert isinstance(bad, UserError) and "layer 2" in str(bad)
    assert "each run warms up alone" in caplog.text
