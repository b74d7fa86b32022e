"""Python, torch and its CUDA, GPUs and their memory, what is installed beside."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from crl_exp.launcher.doctor.finding import (
    Finding,
    Subject,
    asked,
    failed,
    ok,
    skipped,
    warning,
)
from crl_exp.launcher.planning.memory import GIB, Need, need

OLDEST = (3, 11)
EXTRAS = {
    "bitsandbytes": "model.quantization",
    "accelerate": "model.quantization and model.device_map",
}
"""Packages that not everybody needs, and what needs them."""
INSIDE = "type it in a job too: srun --gpus=1 python -m crl_exp doctor OVERRIDES"


def python(subject: Subject) -> Iterator[Finding]:
    told = f"{sys.version.split()[0]}, {sys.executable}"
    if sys.version_info < OLDEST:
        yield failed(told, "Python 3.11 or newer is needed: make setup PYTHON=/path/to/python3.11")
    else:
        yield ok(told)


@dataclass(frozen=True)
class Gpu:
    """name, memory in MiB, free of it, as nvidia-smi tells them."""

    name: str
    total: int
    free: int


def gpus() -> list[Gpu] | str:
    """This machine's NVIDIA GPUs, or in words why they can't be told."""
    query = "--query-gpu=name,memory.total,memory.free"
    code, said = asked(["nvidia-smi", query, "--format=csv,noheader,nounits"])
    if code != 0:
        return said.strip() or "nvidia-smi fails"
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines()]
    # Memory is [N/A] where it is the machine's own.
    told = [row for row in rows if len(row) == 3 and row[1].isdigit() and row[2].isdigit()]
    found = [Gpu(row[0], int(row[1]), int(row[2])) for row in told]
    return found or "nvidia-smi lists none with memory of its own"


def torch_build() -> tuple[str, str | None] | None:
    """torch's version and the CUDA that it was built for, read from its files; None: no torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    built = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return version("torch"), built[1] if built else None


def torch_and_driver(subject: Subject) -> Iterator[Finding]:
    """Whether torch can compute where the config says."""
    build = torch_build()
    if build is None:
        yield failed("torch is not installed", "make setup")
        return
    told = f"torch {build[0]}, " + (f"built for CUDA {build[1]}" if build[1] else "without CUDA")
    if not subject.cuda:
        yield ok(f"{told}; model.device asks for no CUDA")
        return
    if build[1] is None:
        yield failed(
            f"{told}, and model.device=cuda",
            "install a build with CUDA (https://pytorch.org/get-started/locally), or set "
            "model.device=cpu",
        )
        return
    found = gpus()
    if isinstance(found, str):
        yield _no_gpu(subject, f"{told}; {found}")
        return
    yield _driver(told, build[1]) or _torch_sees(told)


def _no_gpu(subject: Subject, told: str) -> Finding:
    if subject.slurm is not None:
        return skipped(f"{told}. A node that submits needs no GPU", INSIDE)
    return failed(
        f"{told}, and model.device=cuda",
        "set model.device=cpu, or hand it to a machine with a GPU: hydra/launcher=slurm",
    )


def _driver(told: str, built: str) -> Finding | None:
    """What of the driver doesn't fit; None where nothing is known against it."""
    _, said = asked(["nvidia-smi"])
    newest = re.search(r"CUDA Version:\s*(\d+\.\d+)", said)
    if newest is None:
        return None
    ours, theirs = (tuple(map(int, text.split(".")[:2])) for text in (built, newest[1]))
    known = f"{told}; the driver takes CUDA up to {newest[1]}"
    advice = f"update the driver, or install a torch that was built for CUDA {newest[1]} or older"
    if ours[0] > theirs[0]:
        return failed(known, advice)
    if ours > theirs:
        return warning(f"{known}, which mostly does", f"if a run fails to find kernels: {advice}")
    return None


def _torch_sees(told: str) -> Finding:
    import torch  # seconds: only where there is a GPU that it is to use

    if torch.cuda.is_available():
        return ok(f"{told}; it sees {torch.cuda.device_count()} GPUs")
    return failed(
        f"{told}; nvidia-smi lists GPUs that torch doesn't see",
        "look at CUDA_VISIBLE_DEVICES, and whether the driver was updated without a restart",
    )


def gpu_memory(subject: Subject) -> Iterator[Finding]:
    """Each model with its SAEs against the smallest GPU here."""
    if not subject.cuda:
        yield skipped("model.device asks for none")
        return
    found = gpus()
    for config in subject.distinct("model", "sae", "layers"):
        if not str(config.model.device).startswith("cuda"):
            continue
        wanted = need(config)
        if wanted is None:
            yield warning(
                f"nothing here tells how large model.path={config.model.path} is",
                "once `python -m crl_exp prefetch …` has fetched it, its files do",
            )
            continue
        told = f"{config.model.name} takes {wanted.gpu / GIB:.1f} GiB at least: {wanted.told}"
        if isinstance(found, str):
            yield skipped(f"{told}. No GPU here to hold it against", INSIDE)
            continue
        if config.model.get("device_map") is not None:
            yield _spread(told, wanted, found)
            continue
        least = min(found, key=lambda gpu: gpu.total)
        told += f". {least.name}: {least.free / 1024:.1f} of {least.total / 1024:.1f} GiB free"
        if wanted.gpu > least.total * 2**20:
            yield failed(
                told,
                "set model.device_map=auto where the node has several, model.quantization=int8 or "
                "nf4, fewer layers, or a larger GPU",
            )
        elif wanted.gpu > least.free * 2**20:
            yield warning(told, "somebody else has the rest: nvidia-smi tells who")
        else:
            yield ok(told)


def _spread(told: str, wanted: Need, found: list[Gpu]) -> Finding:
    """A model that is spread over all GPUs here, its SAEs on one of them."""
    least = min(found, key=lambda gpu: gpu.total)
    told += f". model.device_map spreads it over {len(found)} GPUs, {least.name} the smallest"
    takes = wanted.gpus(least.total / 1024)
    if takes is None:
        return failed(told, "the SAEs, which lie on one GPU, don't fit there: steer fewer layers")
    if takes > len(found):
        return warning(
            f"{told}; it takes {takes} of these",
            "the rest of its weights would be kept on the CPU and fetched for every token: take "
            f"hydra.launcher.gpus={takes}, or model.quantization=int8 or nf4",
        )
    return ok(f"{told}; it takes {takes} of these")


def extras(subject: Subject) -> Iterator[Finding]:
    """Packages that only some configs need."""
    quantized = bool(subject.values("model", "quantization"))
    missing = [name for name in EXTRAS if not _installed(name)]
    spread = bool(subject.values("model", "device_map"))
    if spread and "accelerate" in missing:
        advice = "pip install 'crl-exp[device_map]' -c constraints.txt"
        yield failed("model.device_map needs accelerate", advice)
    if quantized and missing:
        advice = "pip install 'crl-exp[quantization]' -c constraints.txt"
        yield failed(f"model.quantization needs {' and '.join(missing)}", advice)
    elif missing:
        yield ok(f"{', '.join(missing)} not installed, and not asked for")
    else:
        yield ok(", ".join(f"{name} {version(name)}" for name in EXTRAS))
    compiled = "compiled" in subject.values("engine", "decode")
    if compiled and not subject.cuda and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        yield failed(
            "engine.decode=compiled needs a C++ compiler, and there is none here",
            "install g++, or set engine.decode=eager",
        )


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
