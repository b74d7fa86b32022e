"""Rows of the bench that are more than calls of the engine: runs, memory, the GPU's floor."""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig

from crl_exp.config import kept
from crl_exp.experiments import workspace as workspace
from crl_exp.experiments.config import experiment
from crl_exp.experiments.packing import run_pack
from crl_exp.generation.controller import Controller
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.generation.results import Job
from crl_exp.launcher.bench.subject import Subject, never_ending
from crl_exp.runs.directory import RunDirectory
from crl_exp.steering.feature_statistics.measure import measure

Calls = dict[str, Callable[[], float | None]]
ROWS = 64
SHORT_PROMPT = 4


@contextmanager
def run_calls(subject: Subject) -> Iterator[Calls]:
    """Whole runs on the choice task: one, eight variants of it, one for each layer. Each call reads
    the prompts and warms up anew; model and SAEs are loaded before."""
    n = 1500 // subject.scale
    sizes = [
        f"task.n_train={n}", f"task.n_validation={max(2, n // 10)}", f"task.n_test={n}",
        f"algorithm.n_updates={100 // subject.scale}",
        f"algorithm.prompts_per_update={min(50, n)}", "engine.batch_size=100",
    ]  # fmt: skip
    here = [f"sae.folder={subject.sae_folder}", "sae.other_model=true", "layers=single"]
    variants = [
        [f"seed={seed}", f"mask={mask}", f"algorithm.lr_policy={rate}"]
        for seed, mask, rate in itertools.product((0, 1), ("none", "active"), (3e-3, 1e-3))
    ]
    numbers = itertools.count()

    with tempfile.TemporaryDirectory() as folder:

        def composed(layers: list[int], variants: list[list[str]]) -> list[DictConfig]:
            return [
                subject.config(*sizes, *here, f"layers.layer={layer}", *variant)
                for layer in layers
                for variant in variants
            ]

        def play(configs: list[DictConfig]) -> None:
            kept.LOADED["prompts"] = {}
            kept.LOADED["baseline"] = {}
            for config in configs:
                config.output_dir = str(Path(folder) / str(next(numbers)))
            for outcome in run_pack(configs):
                if isinstance(outcome, BaseException):
                    raise outcome

        one = composed([subject.layer], variants[:1])
        eight = composed([subject.layer], variants)
        layers = composed(list(range(subject.lm.n_layers)), variants[:1])
        play(one)  # loads the model
        workspace.RunWorkspace(
            experiment(one[0]), list(range(subject.lm.n_layers)), RunDirectory(one[0])
        )  # SAEs
        yield {
            "one": lambda: play(one),
            "eight": lambda: play(eight),
            "layers": lambda: play(layers),
        }


@contextmanager
def memory_calls(subject: Subject) -> Iterator[Calls]:
    """Peak resident memory, in bytes, of a process that warms up all layers."""

    def child(n: int) -> float:
        command = [
            sys.executable,
            "-m",
            "crl_exp",
            "bench",
            "--subject",
            subject.name,
        ]
        done = subprocess.run(
            [*command, "--memory-child", str(n)], check=True, stdout=subprocess.PIPE, text=True
        )
        return float(done.stdout.split()[-1])

    yield {"small": lambda: child(100), "large": lambda: child(4000)}


def memory_child(subject: Subject, n: int) -> int:
    """Warm up all layers on n short prompts; returns the peak memory of this process in bytes.

    Prompts are streamed: kept ones take memory by design, which `engine.keep_gib` bounds.
    """
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, 200, (n, SHORT_PROMPT), generator=draw).tolist()
    engine = Engine(subject.lm, EngineConfig(batch_size=50, keep_gib=0.0, decode="eager"))
    store = engine.read(prompts)

    def play(observer: Controller, items) -> torch.Tensor:
        engine.generate(store, [Job(observer, items)], 1, subject.choices)
        return torch.tensor([float(i % 2) for i in items])

    measure(subject.saes, "max", n, 50, play)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def static_calls(subject: Subject) -> Iterator[Calls]:
    """One decoding step under a policy, `engine.decode` compiled and eager. The warm-up round
    compiles."""
    ids, controller = subject.prompts(subject.n_prompts), subject.policy("none")
    short, long = 4, 4 + subject.new_tokens

    def step(decode: str) -> Callable[[], float]:
        engine = Engine(subject.lm, EngineConfig(128, subject.exp.engine.keep_gib, decode))
        store = engine.read(ids)

        def answer(n_tokens: int) -> float:
            started = time.perf_counter()
            engine.generate(store, [Job(controller, range(len(ids)))], n_tokens)
            return time.perf_counter() - started

        return lambda: (answer(long) - answer(short)) / (long - short)

    with never_ending(subject):
        yield {"compiled": step("compiled"), "eager": step("eager")}


@contextmanager
def floor_calls(subject: Subject) -> Iterator[Calls]:
    """One decoding step of 64 steered rows, against the time that the GPU takes to read the
    weights and the cache once, at the rate at which it copies."""
    engine = subject.engine
    ids = subject.prompts(ROWS)
    store, controller = engine.read(ids), subject.fixed([subject.layer])
    short, long = 4, 36

    def answer(n_tokens: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine.generate(store, [Job(controller, range(ROWS))], n_tokens)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def step() -> float:
        # The difference leaves out what comes once: gathering the cache, decoding texts.
        return (answer(long) - answer(short)) / (long - short)

    def floor() -> float:
        weights = sum(p.nbytes for p in engine.lm.model.parameters())
        n_tokens = len(ids[0]) + (short + long) // 2
        per_token = 2 * engine.lm.n_layers * engine.lm.d_kv * engine.lm.dtype.itemsize
        return (weights + ROWS * n_tokens * per_token) / bytes_a_second(subject.device)

    yield {"decode": step, "floor": floor}


def bytes_a_second(device: torch.device) -> float:
    """Rate of reading plus writing, of the fastest of ten copies of a GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * 2**30 / best
