"""engine.decode=compiled gives what eager gives, by one graph that no token compiles anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from crl_exp.config.errors import UserError
from crl_exp.generation.compiled import buffers as static_frame
from crl_exp.generation.compiled import step as static_step
from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.generation.results import Generation, Job
from crl_exp.models.language_model import LanguageModel
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.controllers.fixed import FixedFeatures, Steer
from crl_exp.steering.controllers.observer import Observer
from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.controllers.vector import FixedVectors
from crl_exp.steering.stages.base import Stage, StageContext
from tests.helpers import tiny
from tests.helpers.stage_options import EACH, PLAIN, built
from tests.helpers.tiny_steering import AddVector, agent, pipeline, random_sae

KINDS = ("llama", "gemma2", "gpt2")
PROMPTS = tiny.prompts(9, seed=1)
NEW_TOKENS = 10  # Gemma-2's window has 6
SAES = {layer: random_sae(layer, tiny.D_MODEL, seed=layer) for layer in (1, 2)}
PUSH = 3 * torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(0))


@cache
def model(kind: str, device: str = "cpu") -> LanguageModel:
    """Many tokens end an answer, so that rows leave."""
    lm = tiny.language_model(kind)
    lm.model.generation_config.eos_token_id = [1, *range(6, 60, 5)]  # type: ignore[union-attr]
    lm.model.to(device)  # type: ignore[arg-type]
    return lm


class Graphs:
    """A backend that runs graphs as they are, and counts the compilations and the runs."""

    def __init__(self) -> None:
        self.compiled, self.runs = 0, 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        self.compiled += 1

        def run(*given: Tensor):
            self.runs += 1
            return graph(*given)

        return run


@pytest.fixture
def graphs(monkeypatch) -> Graphs:
    """Graphs go through dynamo, and are then run as they are."""
    counted = Graphs()

    def compiled(graph: torch.fx.GraphModule, device: torch.device) -> Callable:
        return torch.compile(graph, fullgraph=True, dynamic=False, backend=counted)

    monkeypatch.setattr(static_step, "compiled", compiled)
    monkeypatch.setattr(static_step, "check_machine", lambda device: None)
    return counted


@pytest.fixture
def captured(monkeypatch) -> Graphs:
    """Graphs are run as they were captured."""
    counted = Graphs()
    monkeypatch.setattr(static_step, "compiled", lambda graph, device: counted(graph, []))
    monkeypatch.setattr(static_step, "check_machine", lambda device: None)
    return counted


def learned(seed: int = 0, explore: bool = True, layers=(2,), **options) -> PolicyController:
    stages = {group: built(group, options.pop(group, PLAIN[group])) for group in PLAIN}
    torch.manual_seed(seed)  # a stage may have first weights of its own
    agents = {
        layer: agent(SAES[layer], tiny.D_MODEL, pipeline(**stages), seed=seed + layer, **options)
        for layer in layers
    }
    draw = torch.Generator().manual_seed(seed) if explore else None
    return PolicyController(agents, Decay(0.9), draw, progress=0.25)


def controllers() -> list[Controller]:
    """Two teams at layer 2, a policy at two layers, fixed features and vectors, one who looks."""
    return [
        learned(0), FixedFeatures([Steer(2, 3, 4.0)], SAES, Decay(0.9)), learned(1),
        learned(2, explore=False, layers=(1, 2), mask="generation", fusion="attention"),
        Observer(SAES, "mean"), FixedVectors({2: PUSH}, {2: 2}, Decay(1.0)),
        FixedFeatures([Steer(2, 5, 2.0)], SAES, Decay(0.9)), Unsteered(),
    ]  # fmt: skip


def engine(kind: str, decode: str, batch_size: int = 128) -> Engine:
    return Engine(model(kind), EngineConfig(batch_size, 1.0, decode))


def answers(made: Engine, acting: list[Controller], n_tokens: int = NEW_TOKENS):
    jobs = [Job(one, [i % 9 for i in range(n, n + 5 + n)]) for n, one in enumerate(acting)]
    return made.generate(made.read(PROMPTS), jobs, n_tokens, record=True)


def assert_same(got: list[Generation], expected: list[Generation], atol: float = 1e-5) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.tokens == b.tokens and len(a.steps) == len(b.steps)
        for x, y in zip(a.steps, b.steps, strict=True):
            assert (x.layer, x.token_index, x.rows) == (y.layer, y.token_index, y.rows)
            assert x.token_B is not None and y.token_B is not None
            assert torch.equal(x.token_B, y.token_B)
            assert torch.equal(x.action.feature_idx_BK, y.action.feature_idx_BK)
            one, other = ({**vars(s.action), **s.action.notes} for s in (x, y))
            for name in one.keys() - {"notes"}:
                assert (one[name] is None) == (other[name] is None), name
                if one[name] is not None:
                    torch.testing.assert_close(one[name], other[name], atol=atol, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "batch_size"), product(KINDS, (128, 10)))
def test_compiled_answers_equal_eager_ones(kind, batch_size, captured) -> None:
    """Rows of different prompts that end at different tokens, several teams, one who looks."""
    acting, eager_acting = controllers(), controllers()
    expected = answers(engine(kind, "eager", batch_size), eager_acting)
    lengths = {len(tokens) for answer in expected for tokens in answer.tokens}
    assert max(map(len, PROMPTS)) > 2 * 6, "longer than Gemma-2's window"
    assert len(lengths) > 2 and max(lengths) > 3, lengths
    assert_same(answers(engine(kind, "compiled", batch_size), acting), expected)
    assert captured.runs > 0
    seen, eager_seen = acting[4], eager_acting[4]
    assert isinstance(seen, Observer) and isinstance(eager_seen, Observer)
    for layer in SAES:
        torch.testing.assert_close(
            seen.pooled_BF[layer], eager_seen.pooled_BF[layer], atol=1e-5, rtol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), EACH, ids=["/".join(pair) for pair in EACH])
def test_every_stage_can_be_captured(group, name, captured) -> None:
    acting = [learned(seed, **{group: name}) for seed in (0, 1)]
    again = [learned(seed, **{group: name}) for seed in (0, 1)]
    expected = answers(engine("llama", "eager"), [*acting], 4)
    assert_same(answers(engine("llama", "compiled"), [*again], 4), expected)
    assert captured.runs > 0


@pytest.mark.slow
def test_the_null_action_and_doses_can_be_captured(captured) -> None:
    options = {"null_action": True, "doses": [0.5, 2.0], "noise": "gaussian"}
    expected = answers(engine("llama", "eager"), [learned(seed, **options) for seed in (0, 1)], 4)
    got = answers(engine("llama", "compiled"), [learned(seed, **options) for seed in (0, 1)], 4)
    assert_same(got, expected)
    assert captured.runs > 0


@pytest.mark.slow
def test_no_token_and_no_rollout_compiles_anew(graphs, monkeypatch) -> None:
    """New random numbers, schedules, weights and prompts are other numbers in the same graph."""
    lm = tiny.language_model("llama")  # its answers have all their tokens
    lm.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    made = Engine(lm, EngineConfig(128, 1.0, "compiled"))
    policy = learned(noise="gaussian")
    answers(made, [policy])
    assert (graphs.compiled, graphs.runs) == (1, NEW_TOKENS - 1)
    for seed in (1, 2):
        policy = learned(seed, noise="gaussian")
        policy.progress = 0.5 * seed
        expected = answers(Engine(lm, EngineConfig(128, 1.0, "eager")), [policy])
        assert_same(answers(made, [policy]), expected)
    assert (graphs.compiled, graphs.runs) == (1, 3 * (NEW_TOKENS - 1))
    answers(made, [learned(mask="active")])
    assert graphs.compiled == 2, "another option is another graph"
    store = made.read(PROMPTS)
    made.generate(store, [Job(learned(3, noise="gaussian"), range(8))], NEW_TOKENS, record=True)
    assert graphs.compiled == 2, "3 rows more, but no more than there are places"
    monkeypatch.setattr(static_step, "KEPT_STEPS", 1)
    made.generate(store, [Job(policy, range(9))], NEW_TOKENS, record=True)
    assert made.compiled is not None
    assert len(made.compiled.made) == len(made.compiled.frames) == 1


@pytest.mark.slow
def test_rows_leave_for_a_frame_of_half_the_size(captured, monkeypatch) -> None:
    sizes: list[int] = []
    call = static_step.CompiledStep.__call__

    def counted(self):
        sizes.append(self.frame.n_rows)
        return call(self)

    monkeypatch.setattr(static_step.CompiledStep, "__call__", counted)
    monkeypatch.setattr(static_frame, "FEWEST_ROWS", 1)
    monkeypatch.setattr("crl_exp.generation.decode.COMPACT_BELOW", 0.0)
    acting = [learned(seed, mask="generation", fusion="attention") for seed in range(3)]
    again = [learned(seed, mask="generation", fusion="attention") for seed in range(3)]
    got = answers(engine("llama", "compiled"), [*acting])
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 2
    assert all(size == static_frame.padded_rows(size) for size in sizes)
    assert captured.compiled == len(set(sizes))
    expected = answers(engine("llama", "eager"), [*again])
    assert_same(got, expected)
    monkeypatch.setattr(static_step, "KEPT_STEPS", 1)
    first = sizes[0]
    sizes.clear()
    again = [learned(seed, mask="generation", fusion="attention") for seed in range(3)]
    assert_same(answers(engine("llama", "compiled"), [*again]), expected)
    assert set(sizes) == {first}, "no graph makes way for a smaller one"


@pytest.mark.slow
def test_memory_that_is_not_enough_is_given_back(captured, monkeypatch) -> None:
    call, forget, forgotten = static_step.CompiledStep.__call__, static_step.Steps.forget, []

    def small(self):
        if self.frame.n_rows > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self)

    monkeypatch.setattr(static_step.CompiledStep, "__call__", small)
    monkeypatch.setattr(
        static_step.Steps, "forget", lambda self: forgotten.append(len(self.made)) or forget(self)
    )
    made = Engine(model("llama"), EngineConfig("auto", 1.0, "compiled"))
    got = answers(made, [learned(seed) for seed in range(3)], 3)
    expected = answers(engine("llama", "eager"), [learned(seed) for seed in range(3)], 3)
    assert [one.tokens for one in got] == [one.tokens for one in expected]
    assert forgotten == [1], "the graph of too many rows, once"


@pytest.mark.slow
def test_the_frame_holds_the_whole_answer(captured, monkeypatch) -> None:
    monkeypatch.setattr(static_frame, "TOKENS", 1)
    expected = answers(engine("llama", "eager"), [learned(0)])
    assert_same(answers(engine("llama", "compiled"), [learned(0)]), expected)


def test_padding() -> None:
    assert [static_frame.frame_rows(n) for n in (1, 16, 17)] == [16, 16, 32]
    assert [static_frame.padded_rows(n) for n in (1, 2, 3, 8, 9, 100)] == [1, 2, 4, 8, 16, 128]
    assert [static_frame.padded_tokens(n) for n in (1, 64, 65, 128)] == [64, 64, 128, 128]


def test_one_token_needs_no_graph(captured) -> None:
    made, eager = engine("llama", "compiled"), engine("llama", "eager")
    assert_same(answers(made, [learned()], 1), answers(eager, [learned()], 1))
    assert captured.compiled == 0


class Peeking(Stage):
    """Looks at a number, which a graph can't know."""

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC + 1 if float(logits_BC.sum()) > 0 else logits_BC


def test_what_cannot_be_captured_is_refused_with_the_way_out(captured) -> None:
    with pytest.raises(UserError, match=r"AddVector.*engine\.decode=eager"):
        answers(engine("llama", "compiled"), [AddVector({1: PUSH})])
    policy = learned()
    policy.agents[2].pipeline.stages["fusion"] = Peeking()
    with pytest.raises(UserError, match=r"can't be captured.*engine\.decode=eager"):
        answers(engine("llama", "compiled"), [policy])


def test_a_machine_without_compiler_is_told() -> None:
    from torch._inductor import config

    none = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with none, pytest.raises(UserError, match=r"C\+\+ compiler.*engine\.decode=eager"):
        engine("llama", "compiled")


def test_a_wrong_word_is_told() -> None:
    assert EngineConfig(1, 1.0, "compield").faults() == [
        "engine.decode=compield: must be one of eager, compiled; did you mean 'compiled'?"
    ]


def compiler_missing() -> bool:
    try:
        static_step.check_machine(torch.device("cpu"))
    except UserError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.skipif(compiler_missing(), reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["llama"])
def test_compiled_by_inductor_on_the_cpu(kind) -> None:
    """One policy and few tokens: a minute goes into compiling."""
    expected = answers(engine(kind, "eager"), [learned(0, noise="gaussian")], 3)
    assert_same(answers(engine(kind, "compiled"), [learned(0, noise="gaussian")], 3), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graphs(kind) -> None:
    """Twice, so that graphs are recorded and then replayed."""
    lm = model(kind, "cuda")
    sae = random_sae(2, tiny.D_MODEL)
    sae.sae.to("cuda")

    def acting() -> list[Controller]:
        made: list[Controller] = [FixedFeatures([Steer(2, 3, 4.0)], {2: sae}, Decay(0.9))]
        for seed in (0, 1):
            draw = torch.Generator("cuda").manual_seed(seed)
            one = agent(sae, tiny.D_MODEL, pipeline(), seed=seed)
            made.append(PolicyController({2: one}, Decay(0.9), draw))
        return made

    expected = answers(Engine(lm, EngineConfig(128, 1.0, "eager")), acting())
    compiled = Engine(lm, EngineConfig(128, 1.0, "compiled"))
    for _ in range(3):
        assert_same(answers(compiled, acting()), expected, atol=1e-4)
