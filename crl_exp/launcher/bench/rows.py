"""The rows of `make bench`: what is timed, over what, and the goal.

A group's calls are timed in turn; a figure is the ratio of two of them. Whole runs, memory and the
GPU's floor are in `crl_exp.launcher.bench.runs`.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.generation.engine import Prompts
from crl_exp.generation.results import Generation, Job
from crl_exp.launcher.bench.commands import FEW, MANY, many_calls, startup_calls
from crl_exp.launcher.bench.peers import Chosen, HookedLoop
from crl_exp.launcher.bench.plain_ppo import PlainPPO
from crl_exp.launcher.bench.runs import (
    floor_calls,
    memory_calls,
    memory_child,
    run_calls,
    static_calls,
)
from crl_exp.launcher.bench.subject import Subject, never_ending
from crl_exp.steering.feature_statistics.measure import measure as measure_warmup
from crl_exp.steering.policy.algorithms import PPO
from crl_exp.steering.policy.learner import LayerLearner, Rollout, collect

__all__ = ["GROUPS", "Calls", "Figure", "Group", "memory_child"]

Calls = dict[str, Callable[[], float | None]]
"""By name; a call that returns a number is not timed, the number counts."""
PACKAGE = "steering_vectors"
VARIANTS, BATCH_EACH, CHOICE_PROMPTS = 8, 16, 50
UPDATES = 5
"""In a row, so that a time of some milliseconds is one of some ten."""


@dataclass
class Figure:
    """Seconds of `top` over seconds of `bottom`. needs: cuda, graphs (cuda; where the row is asked
    for by name a CPU will do), text (a model that answers a task), package, or nothing."""

    name: str
    what: str
    top: str
    bottom: str
    goal: float
    at_least: bool = False
    needs: str = ""

    def missing(self, subject: Subject, named: bool = False) -> str | None:
        """Why it can't be measured here. named: the rows were asked for by name."""
        if self.needs == "cuda" and not torch.cuda.is_available():
            return "there is no NVIDIA GPU"
        if self.needs == "graphs" and not torch.cuda.is_available() and not named:
            return "there is no NVIDIA GPU; --only static measures it on this CPU, which compiles"
        if self.needs == "text" and subject.name == "gemma":
            return "the random model answers no task; --subject smollm2 measures it"
        if self.needs == "package" and importlib.util.find_spec(PACKAGE) is None:
            return (
                "needs the package steering-vectors, which asks for an older transformers: "
                "pip install --no-deps steering-vectors==0.12.2"
            )
        return None


@dataclass
class Group:
    """Calls that are timed in turn, and the figures made of them. warm_ups: rounds not counted."""

    name: str
    calls: Callable[[Subject], AbstractContextManager[Calls]]
    figures: list[Figure]
    rounds: int
    warm_ups: int = 0


@contextmanager
def rates(subject: Subject) -> Iterator[Calls]:
    """The same prompts and numbers of tokens everywhere, the reading of the prompts included."""
    lm, ids, n_tokens = subject.lm, subject.prompts(subject.n_prompts), subject.new_tokens
    width = max(map(len, ids))
    input_ids = torch.tensor([[0] * (width - len(p)) + p for p in ids], device=lm.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in ids], device=lm.device)

    def plain() -> None:
        lm.model.generate(  # type: ignore[operator]
            input_ids=input_ids, attention_mask=mask, max_new_tokens=n_tokens,
            min_new_tokens=n_tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    def package() -> None:
        from steering_vectors import SteeringVector  # type: ignore[import-not-found]

        W_dec_FD = subject.saes[subject.layer].W_dec_FD
        with SteeringVector({subject.layer: 1e-3 * W_dec_FD[0].to(lm.dtype)}).apply(lm.model):
            plain()

    def steered(controller: Controller) -> Callable[[], None]:
        return lambda: answer(subject, controller, ids, n_tokens)

    with never_ending(subject):
        yield {
            "plain": plain,
            "fixed": steered(subject.fixed([subject.layer])),
            "policy": steered(subject.policy("active")),
            "all": steered(subject.fixed(list(subject.saes))),
            "package": package,
        }


def several(update: Callable[[], object]) -> float | None:
    """Seconds of processor time of `UPDATES` in a row; on a GPU nothing, and the clock's count."""
    started = time.process_time()
    for _ in range(UPDATES):
        update()
    return None if torch.cuda.is_available() else time.process_time() - started


def answer(subject: Subject, controller: Controller, ids: list[list[int]], n_tokens: int) -> None:
    engine = subject.engine
    engine.generate(engine.read(ids), [Job(controller, range(len(ids)))], n_tokens)


@contextmanager
def warmups(subject: Subject) -> Iterator[Calls]:
    """Statistics of all layers against the same answers without, prompts read in both."""
    ids, n_tokens = subject.prompts(subject.n_prompts), subject.new_tokens

    def warm_up() -> None:
        store = subject.engine.read(ids)

        def play(observer: Controller, items) -> torch.Tensor:
            subject.engine.generate(store, [Job(observer, items)], n_tokens)
            return torch.tensor([float(i % 2) for i in items])

        measure_warmup(subject.saes, "max", len(ids), len(ids), play)

    with never_ending(subject):
        yield {
            "unsteered": lambda: answer(subject, Unsteered(), ids, n_tokens),
            "warmup": warm_up,
        }


@contextmanager
def peers(subject: Subject) -> Iterator[Calls]:
    """CorrSteer by the engine and by a plain loop, on the same prompts in the same batches: a test
    has it that both find the same features and give the same answers."""
    ids, n_tokens, engine = subject.prompts(subject.n_prompts), subject.new_tokens, subject.engine
    loop = HookedLoop(subject.lm, subject.saes, n_tokens, len(ids))
    one = [Chosen(subject.layer, 0, 0.0, 1e-3)]
    every = [Chosen(layer, 0, 0.0, 1e-3) for layer in subject.saes]
    kept = engine.read(ids)

    def loop_warmup() -> None:
        loop.warm_up(ids, lambda i: float(i % 2), 0.0)

    def by_the_loop() -> None:
        for chosen in ([], one, every):
            loop.answer(ids, loop.addition(chosen))

    def by_the_engine(read: Callable[[], Prompts]) -> None:
        for controller in (
            Unsteered(), subject.fixed([subject.layer]), subject.fixed(list(subject.saes))
        ):  # fmt: skip
            engine.generate(read(), [Job(controller, range(len(ids)))], n_tokens)

    with never_ending(subject), warmups(subject) as ours:
        yield {
            "loop_warmup": loop_warmup,
            "warmup": ours["warmup"],
            "loop_answers": by_the_loop,
            "answers": lambda: by_the_engine(lambda: engine.read(ids)),
            "kept_answers": lambda: by_the_engine(lambda: kept),
        }


@contextmanager
def updates(subject: Subject) -> Iterator[Calls]:
    """Rollouts, prompts kept or read again, the PPO updates from them, and plain PPO's."""
    engine, learner = subject.engine, LayerLearner(subject.agent("none"), subject.exp.algorithm)
    controller, shuffle = subject.policy("none", explore=True), torch.Generator().manual_seed(0)
    controller.agents = {subject.layer: learner.agent}
    ids = subject.prompts(CHOICE_PROMPTS)
    store = engine.read(ids)

    def roll_out(prompts, n: int, n_tokens: int, choices: list[int] | None) -> Generation:
        return engine.generate(
            prompts, [Job(controller, range(n))], n_tokens, choices, record=True
        )[0]  # fmt: skip

    def collected(played: Generation) -> Rollout:
        reward_B = torch.arange(len(played.tokens), device=subject.device) % 2
        return collect(subject.layer, played, reward_B.float(), learner.algorithm)

    def learn(played: Generation) -> None:
        learner.update(collected(played), 1, shuffle)

    def plainly(played: Generation) -> Callable[[], float | None]:
        assert isinstance(learner.algorithm, PPO)
        plain = PlainPPO(learner.agent, learner.algorithm, collected(played))
        return lambda: several(lambda: plain.update(shuffle))

    with never_ending(subject):
        choice = roll_out(store, len(ids), 1, subject.choices)
        text = roll_out(store, BATCH_EACH, subject.long_tokens, None)

        def call(play: Callable[[], object]) -> Callable[[], None]:
            def quietly() -> None:
                play()

            return quietly

        yield {
            "kept": call(lambda: roll_out(store, len(ids), 1, subject.choices)),
            "read": call(lambda: roll_out(engine.read(ids), len(ids), 1, subject.choices)),
            "text": call(lambda: roll_out(store, BATCH_EACH, subject.long_tokens, None)),
            "learn_choice": lambda: learn(choice),
            "learn_text": lambda: learn(text),
            "ours_choice": lambda: several(lambda: learn(choice)),
            "ours_text": lambda: several(lambda: learn(text)),
            "plain_choice": plainly(choice),
            "plain_text": plainly(text),
        }


@contextmanager
def packed_text(subject: Subject) -> Iterator[Calls]:
    """A rollout and its update, prompts kept: of one policy, and of eight in one call."""
    engine = subject.engine
    store = engine.read(subject.prompts(BATCH_EACH))

    agents = [subject.agent("none") for _ in range(VARIANTS)]
    learners = [LayerLearner(agent, subject.exp.algorithm) for agent in agents]

    def train(n: int) -> None:
        jobs = [
            Job(subject.acting(agent, explore=True, seed=seed), range(BATCH_EACH))
            for seed, agent in enumerate(agents[:n])
        ]
        reward_B = (torch.arange(BATCH_EACH, device=subject.device) % 2).float()
        played = engine.generate(store, jobs, subject.long_tokens, record=True)
        for learner, one in zip(learners[:n], played, strict=True):
            rollout = collect(subject.layer, one, reward_B, learner.algorithm)
            learner.update(rollout, 1, torch.Generator().manual_seed(0))

    with never_ending(subject):
        yield {"one": lambda: train(1), "eight": lambda: train(VARIANTS)}


GROUPS = [
    Group("rates", rates, [
        Figure("steered_fixed", "model.generate / one fixed feature, one layer", "plain", "fixed",
               1.0, at_least=True),
        Figure("steered_policy", "model.generate / CRL policy, active mask, one layer", "plain",
               "policy", 0.85, at_least=True),
        Figure("steered_all", "model.generate / a fixed feature at every layer", "plain", "all",
               0.9, at_least=True),
        Figure("package", "steering-vectors 0.12 / one fixed feature, one layer", "package",
               "fixed", 1.0, at_least=True, needs="package"),
    ], rounds=3, warm_ups=1),
    Group("warmup", warmups, [
        Figure("warmup_time", "warmup, statistics of all layers / unsteered answers", "warmup",
               "unsteered", 1.3),
    ], rounds=2, warm_ups=1),
    Group("peers", peers, [
        Figure("peer_warmup", "CorrSteer as a loop around model.generate / warmup, all layers",
               "loop_warmup", "warmup", 1.0, at_least=True),
        Figure("peer_answers", "that loop's answers, unsteered, one feature, one a layer / the "
               "engine's", "loop_answers", "answers", 1.0, at_least=True),
        Figure("peer_kept", "the same / prompts kept", "loop_answers", "kept_answers", 1.0,
               at_least=True),
    ], rounds=3, warm_ups=1),
    Group("updates", updates, [
        Figure("rollout_kept", "rollout of 50 choice prompts kept / read again", "kept", "read",
               1 / 30),
        Figure("update_choice", "PPO update / rollout of 50 choice prompts, kept", "learn_choice",
               "kept", 1.0),
        Figure("update_text", "PPO update / rollout of 16 x 32 tokens, prompts kept", "learn_text",
               "text", 0.15),
    ], rounds=3, warm_ups=1),
    Group("update", updates, [
        Figure("update_choice_plain", "PPO update, gathering its rollout / plain PPO's from given "
               "tensors, 50 x 1 token", "ours_choice", "plain_choice", 1.1),
        Figure("update_text_plain", "the same, 16 x 32 tokens", "ours_text", "plain_text", 1.1),
    ], rounds=9, warm_ups=2),
    Group("pack_text", packed_text, [
        Figure("pack_text", "8 policies / 1: rollout of 16 x 32 tokens each, and update", "eight",
               "one", 3.0),
    ], rounds=5, warm_ups=1),
    Group("runs", run_calls, [
        Figure("pack_choice", "8 packed runs / 1, choice task, 1/--scale of 1,500 + 1,500 prompts "
               "and 100 updates of 50", "eight", "one", 1.5, needs="text"),
        Figure("layerwise", "packed runs of every layer / 1 run, the same", "layers", "one", 4.0,
               needs="text"),
    ], rounds=2),
    Group("memory", memory_calls, [
        Figure("warmup_memory", "peak memory of warmup, 4,000 answers / 100", "large", "small",
               1.05, needs="text"),
    ], rounds=1),
    Group("static", static_calls, [
        Figure("static", "decoding one token by a policy, compiled / eager", "compiled", "eager",
               1.0, needs="graphs"),
    ], rounds=3, warm_ups=1),
    Group("floor", floor_calls, [
        Figure("decode_floor", "decoding one token of 64 rows, steered / reading weights and cache "
               "once", "decode", "floor", 2.0, needs="cuda"),
    ], rounds=5, warm_ups=1),
    Group("startup", startup_calls, [
        Figure("startup_help", "launch.py --help / import hydra", "help", "hydra", 5.0),
        Figure("startup_job", "launch.py --cfg job / import hydra", "job", "hydra", 5.0),
        Figure("startup_typo", "a refused typo / import hydra", "typo", "hydra", 7.0),
    ], rounds=5, warm_ups=1),
    Group("commands", many_calls, [
        Figure("status_many", f"status of {MANY} finished runs / {FEW}", "status_many",
               "status_few", MANY / FEW),
        Figure("report_many", f"report made again of {MANY} finished runs / {FEW}", "report_many",
               "report_few", MANY / FEW),
    ], rounds=3, warm_ups=1),
]  # fmt: skip
