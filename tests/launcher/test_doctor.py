"""`python -m crl_exp doctor`: each check against a machine that has, or hasn't, what it looks for.

The machine's programs (nvidia-smi, sinfo) are scripts put before the others; servers are real ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from crl_exp.launcher.doctor import cluster, machine, storage
from crl_exp.launcher.doctor.command import CHECKS, composed, main
from crl_exp.launcher.doctor.finding import Subject
from crl_exp.launcher.doctor.mounts import is_network, kind_of
from crl_exp.models.sizes import CARDS, model_size
from crl_exp.models.tiny import tiny_model

SINFO = """debug*|up|infinite|(null)
gpu|up|1-00:00:00|gpu:a100:4
gpu|up|1-00:00:00|gpu:v100:8
old|down|2:00:00|(null)
"""


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder of programs that are found before the machine's own."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    for name in ("sbatch", "srun", "scontrol", "squeue", "scancel"):
        put(folder, name, "exit 0")
    return folder


def put(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def printing(text: str) -> str:
    return f"cat <<'END'\n{text.strip()}\nEND"


def gpu(folder: Path, total: int, free: int, cuda: str = "13.9") -> None:
    """An nvidia-smi that lists one GPU; memory in MiB."""
    put(folder, "nvidia-smi", f'[ "$1" ] && echo "A GPU, {total}, {free}" && exit 0\n'
        f'echo "| Driver Version: 1.2   CUDA Version: {cuda} |"')  # fmt: skip


def subject(*overrides: str, tmp_path: Path) -> Subject:
    return composed(["+debug=tiny", f"output_dir={tmp_path}/out", *overrides])


def told(check, of: Subject) -> dict[str, str]:
    """State of each finding by what it tells and advises."""
    return {f"{one.told} → {one.advice}": one.state for one in check(of)}


def the(found: dict[str, str], words: str) -> str:
    """The state of the one finding that has these words."""
    (state,) = [state for text, state in found.items() if words in text]
    return state


GEMMA = ("model=gemma2_2b_it", "sae=gemma_scope_2b_res", "layers=single", "layers.layer=12")


def test_a_machine_without_gpu_and_slurm_is_fit_for_a_tiny_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["+debug=tiny", f"output_dir={tmp_path}/out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {one.split(maxsplit=1)[1][:11].strip() for one in lines[:-1] if one[0] != " "} == set(
        CHECKS
    )
    skipped = [one for one in lines if one.startswith("skipped")]
    assert any("SLURM" in one and "no SLURM is here" in one for one in skipped)
    assert any("GPU memory" in one for one in skipped)
    assert lines[-1].endswith(f", 0 failed, {len(skipped)} skipped")
    assert not (tmp_path / "out").exists(), "nothing is made"


def test_only_a_failure_ends_with_1(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert (
        main(
            [
                "+debug=tiny",
                f"output_dir={tmp_path}/out",
                "tracking=mlflow",
                "tracking.uri=http://localhost:1",
            ]
        )
        == 0
    )
    assert "1 warning, 0 failed" in capsys.readouterr().out
    assert main(["+debug=tiny", f"output_dir={tmp_path}/file/out"]) == 1
    said = capsys.readouterr().out
    assert "→ set output_dir=/a/folder/you/can/write" in said and "1 failed" in said


def test_a_mistyped_override_is_refused_as_by_launch(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["model=gema2_2b_it"])
    assert "did you mean 'gemma2_2b_it'" in str(ended.value.code)


def test_what_is_not_set_fails_its_check_and_no_other(tmp_path, capsys):
    assert main(["+debug=tiny", f"output_dir={tmp_path}", "model=hf"]) == 1
    said = capsys.readouterr().out
    assert "model.path" in said and said.count("\n") > len(CHECKS)


# --- the machine ---


@pytest.mark.parametrize(
    ("free", "total", "state"), [(4000, 4000, "failed"), (5000, 81000, "warning"),
                                 (80000, 81000, "ok")],
)  # fmt: skip
def test_a_models_need_is_held_against_the_gpu(programs, tmp_path, free, total, state):
    gpu(programs, total, free)
    found = told(machine.gpu_memory, subject(*GEMMA, tmp_path=tmp_path))
    # 2.61e9 parameters of 2 bytes, two matrices of 16,384 × 2,304 floats, and 2 GiB beside.
    need = (CARDS["google/gemma-2-2b-it"].parameters * 2 + 2 * 16384 * 2304 * 4) / 2**30 + 2
    assert the(found, f"takes {need:.1f} GiB at least: 2.61 billion") == state


def test_a_spread_models_need_is_held_against_all_gpus(programs, tmp_path):
    overrides = ("model=gemma2_27b", "sae=none", "model.device_map=auto", "method=none")
    for n, state in ((1, "warning"), (2, "ok")):
        put(programs, "nvidia-smi", "\n".join(["echo 'A GPU, 40960, 40000'"] * n))
        found = told(machine.gpu_memory, subject(*overrides, tmp_path=tmp_path))
        assert the(found, f"spreads it over {n} GPUs, A GPU the smallest; it takes 2") == state


def test_a_spread_model_needs_accelerate(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_installed", lambda name: name != "accelerate")
    found = told(machine.extras, subject("model.device_map=auto", tmp_path=tmp_path))
    assert the(found, "crl-exp[device_map]") == "failed"
    assert "failed" not in told(machine.extras, subject(tmp_path=tmp_path)).values()


def test_without_a_gpu_the_need_is_told_and_an_unknown_one_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    gemma = told(machine.gpu_memory, subject(*GEMMA, tmp_path=tmp_path))
    assert the(gemma, "takes 7.2 GiB at least") == "skipped"
    more = ("model=hf", "model.path=nobody/knows", "model.device=cuda", "sae=none")
    unknown = told(machine.gpu_memory, subject(*more, tmp_path=tmp_path))
    assert the(unknown, "how large model.path=nobody/knows is") == "warning"


def test_a_missing_gpu_is_a_failure_but_for_a_node_that_submits(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "torch_build", lambda: ("2.9", "12.8"))
    here = told(machine.torch_and_driver, subject(*GEMMA, tmp_path=tmp_path))
    assert the(here, "there is no nvidia-smi here") == "failed"
    away = subject(*GEMMA, "hydra/launcher=slurm", tmp_path=tmp_path)
    assert the(told(machine.torch_and_driver, away), "needs no GPU") == "skipped"


def test_a_torch_without_cuda_is_a_failure_where_cuda_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "torch_build", lambda: ("2.9", None))
    asks = told(machine.torch_and_driver, subject(*GEMMA, tmp_path=tmp_path))
    assert the(asks, "without CUDA, and model.device=cuda") == "failed"
    assert list(told(machine.torch_and_driver, subject(tmp_path=tmp_path)).values()) == ["ok"]


def test_the_build_of_torch_is_read_without_importing_it():
    import torch

    build = machine.torch_build()
    assert build is not None and build[1] == torch.version.cuda
    assert build[0] == torch.__version__


@pytest.mark.parametrize(
    ("driver", "state"), [("11.8", "failed"), ("12.4", "warning"), ("12.8", None), ("13.0", None)]
)
def test_the_driver_is_held_against_the_build(programs, driver, state):
    gpu(programs, 8000, 8000, cuda=driver)
    found = machine._driver("torch", "12.8")
    assert (found and found.state) == state


def test_a_package_that_the_config_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "EXTRAS", {"no-such-package": "model.quantization"})
    plain, int8 = (subject(*more, tmp_path=tmp_path) for more in ((), ("model.quantization=int8",)))
    assert list(told(machine.extras, plain).values()) == ["ok"]
    assert the(told(machine.extras, int8), "needs no-such-package") == "failed"


# --- sizes of models ---


def test_a_models_size_is_read_from_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))
    made = tiny_model("llama")
    n = sum(a.size for file in made.glob("*.safetensors") for a in load_file(file).values())
    size = model_size(str(made))
    assert size is not None and (size.parameters, size.source) == (n, "its files")
    assert size.n_layers and size.d_model

    cached = tmp_path / "hub" / "models--me--mine"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("c0ffee")
    (cached / "snapshots").mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert model_size("me/mine") is None, "fetched halfway"
    (cached / "snapshots" / "c0ffee").symlink_to(made)
    of_the_cache = model_size("me/mine")
    assert of_the_cache is not None and of_the_cache.parameters == n
    assert of_the_cache.source == "its files in the hub's cache"


def test_a_shipped_models_card_has_the_size_of_the_model_itself():
    """Of the architecture with the numbers that its card gives, where no file is at hand."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    card = CARDS["openai-community/gpt2"]
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert model.num_parameters() == card.parameters
    assert (model.config.n_embd, model.config.n_layer) == (card.d_model, card.n_layers)


# --- the cluster ---


def asked(*overrides: str, tmp_path: Path) -> dict[str, str]:
    more = ("hydra/launcher=slurm", *overrides)
    return told(cluster.slurm, subject(*more, tmp_path=tmp_path))


@pytest.mark.parametrize(
    ("overrides", "words", "state"),
    [
        ((), "partition debug: limit infinite", "ok"),
        (("hydra.launcher.partition=gpu",), "partition gpu: limit 1-00:00:00, gpu:a100:4", "ok"),
        (("hydra.launcher.partition=gup",), "did you mean 'gpu'", "failed"),
        (("hydra.launcher.partition=old",), "partition old is down", "warning"),
        (("hydra.launcher.partition=gpu", "hydra.launcher.time=1-00:00:01"),
         "hydra.launcher.time=1-00:00:01 is over the limit of gpu", "failed"),
        (("hydra.launcher.gpus=2",), "2 GPUs are asked of each job, and debug lists none",
         "failed"),
        (GEMMA, "1 GPUs are asked of each job, and debug lists none", "failed"),
    ],
)  # fmt: skip
def test_what_is_asked_of_a_partition(programs, tmp_path, overrides, words, state):
    version = '[ "$1" = --version ] && echo slurm 24.05.1 && exit 0\n'
    put(programs, "sinfo", version + printing(SINFO))
    found = asked(*overrides, tmp_path=tmp_path)
    assert the(found, "slurm 24.05.1, partitions debug*, gpu, old") == "ok"
    assert the(found, words) == state


def test_a_cluster_that_does_not_answer_fails_only_whom_it_is_asked_by(programs, tmp_path):
    put(programs, "sinfo", "echo Unable to contact slurm controller >&2; exit 1")
    assert the(asked(tmp_path=tmp_path), "Unable to contact slurm controller") == "failed"
    away = told(cluster.slurm, subject(tmp_path=tmp_path))
    assert the(away, "Unable to contact slurm controller; hydra/launcher=slurm") == "skipped"


def test_no_slurm_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert the(asked(tmp_path=tmp_path), "there is no sbatch, srun") == "failed"


# --- folders and servers ---


def test_the_file_system_of_a_folder(tmp_path):
    (tmp_path / "a b" / "deep").mkdir(parents=True)
    table = tmp_path / "mounts"
    lines = [
        "/dev/sda / ext4 rw 0 0", f"fs:/x {tmp_path} nfs4 rw 0 0",
        f"tmpfs {tmp_path}/a\\040b tmpfs rw 0 0", f"lustre {tmp_path}/a\\040b lustre rw 0 0",
    ]  # fmt: skip
    table.write_text("\n".join(lines))
    assert kind_of(Path("/"), table) == "ext4"
    assert kind_of(tmp_path / "not" / "made yet", table) == "nfs4"
    assert kind_of(tmp_path / "a b" / "deep", table) == "lustre", "the last one hides the others"
    assert kind_of(tmp_path.parent / f"{tmp_path.name}x", table) == "ext4", "not by its beginning"
    assert kind_of(tmp_path, tmp_path / "no such table") is None
    shared = [kind for kind in ("nfs4", "lustre", "gpfs", "fuse.sshfs", "ext4", "xfs", "overlay")
              if is_network(kind)]  # fmt: skip
    assert shared == ["nfs4", "lustre", "gpfs", "fuse.sshfs"]


@pytest.fixture
def on(monkeypatch):
    """Has every folder lie on a file system of this type."""
    return lambda kind: monkeypatch.setattr(storage, "kind_of", lambda path: kind)


def test_a_local_disk_is_a_warning_for_nodes_alone(tmp_path, on):
    here = subject(tmp_path=tmp_path)
    nodes = subject("hydra/launcher=slurm", tmp_path=tmp_path)
    for kind, states in (("ext4", ["ok", "warning"]), ("nfs4", ["ok", "ok"])):
        on(kind)
        found = [told(storage.output_dir, one) for one in (here, nodes)]
        assert [next(iter(one.values())) for one in found] == states
    assert list(told(storage.code, nodes).values()) == ["ok"]
    on("tmpfs")
    assert the(told(storage.output_dir, here), "gone after a restart") == "warning"


def test_sqlite_on_a_network_disk_is_a_warning(tmp_path, on):
    on("nfs4")
    found = told(storage.mlflow, subject("tracking=mlflow", tmp_path=tmp_path))
    assert the(found, "SQLite's locks can't be relied on") == "warning"
    assert "tracking.uri=http://NODE:5000" in next(iter(found))


@pytest.fixture
def server() -> Iterator[tuple[HTTPServer, list]]:
    """An HTTP server that answers with the code and text put into its list."""
    answer: list = [200, b"OK"]

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer[0] if self.path == "/health" else 404)
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made, answer
        made.shutdown()


def test_what_a_server_answers(server, tmp_path):
    made, answer = server
    uri = f"tracking.uri=http://127.0.0.1:{made.server_port}"
    asks = subject("tracking=mlflow", uri, tmp_path=tmp_path)
    assert the(told(storage.mlflow, asks), "answers") == "ok"
    answer[1] = b"<html>"
    assert the(told(storage.mlflow, asks), "it is no MLflow server") == "warning"
    answer[0] = 401
    assert the(told(storage.mlflow, asks), "MLFLOW_TRACKING_USERNAME") == "warning"


def test_what_the_hub_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    wanted = (*GEMMA, "task=gsm8k")
    nodes = subject(*wanted, "hydra/launcher=slurm", tmp_path=tmp_path)
    found = told(storage.hub, nodes)
    assert the(found, "google/gemma-2-2b-it isn't there yet (4.9 GiB)") == "warning"
    assert the(found, "openai/gsm8k isn't there yet") == "warning"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = told(storage.hub, nodes)
    assert the(found, "google/gemma-2-2b-it isn't there yet") == "failed"
    (tmp_path / "hub" / "datasets--openai--gsm8k").mkdir(parents=True)
    assert the(told(storage.hub, nodes), "openai/gsm8k is there") == "ok"
    monkeypatch.setattr(storage, "free_bytes", lambda path: 2**30)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert the(told(storage.hub, nodes), "there is no room for it") == "failed"


def test_missing_assets_and_saes_are_failures(tmp_path, monkeypatch):
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))
    more = ("model=smollm2_135m", "task=sentiment", "sae=disk", f"sae.folder={tmp_path}")
    found = told(storage.files, subject(*more, tmp_path=tmp_path))
    assert the(found, "data/hutto_icwsm_2014, models/SmolLM2-135M-Instruct not in") == "failed"
    assert the(found, f"sae.folder={tmp_path}: no SAE") == "failed"


def test_every_task_that_reads_an_asset_is_known(monkeypatch, tmp_path):
    """Tried: each task of conf/ is drawn with an empty cache, and says what it misses."""
    from crl_exp.config.errors import UserError
    from crl_exp.experiments import config as configs
    from tests.helpers.tiny_run import CONF

    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))
    for path in sorted((CONF / "task").glob("*.yaml")):
        if "hub_id" in path.read_text() or path.stem in ("jsonl", "lm_eval", "tiny"):
            continue
        of = composed(["+debug=tiny", f"task={path.stem}"])
        task = configs.experiment(of.configs[0]).task
        with pytest.raises(UserError, match="is not in") as missing:
            task.drawn()
        assert "failed" in told(storage.files, of).values(), missing.value
