"""How rows are cut into batches, and what happens when they don't fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Unsteered
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.generation.prompt_features import PromptActs
from crl_exp.generation.prompts import PromptStore
from crl_exp.generation.results import Job
from crl_exp.models import batching
from crl_exp.models.batching import BatchSize, batches, bytes_to_decode, free_bytes
from crl_exp.models.language_model import LanguageModel
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.controllers.fixed import FixedFeatures, Steer
from crl_exp.steering.controllers.observer import Observer
from crl_exp.steering.controllers.vector import FixedVectors
from tests.helpers import tiny
from tests.helpers.tiny_run import run_small
from tests.helpers.tiny_steering import random_sae

PROMPTS = tiny.prompts(12)


LENGTHS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4)


@given(LENGTHS, st.integers(1, 30), st.data())
def test_every_row_is_in_one_batch(lengths: list[list[int]], size: int, data) -> None:
    same = data.draw(st.booleans())
    starts = [0 if same else data.draw(st.integers(0, 3)) for _ in lengths]
    found = batches(lengths, size, starts, data.draw(st.integers(1, 9)))
    rows = [row for batch in found for row in batch]
    assert sorted(rows) == [(job, at) for job, own in enumerate(lengths) for at in range(len(own))]
    assert all(batch == sorted(batch) and len(batch) <= size for batch in found)
    if same:
        assert all(len(batch) == size for batch in found[:-1])
        longest = [max(lengths[job][at] for job, at in batch) for batch in found]
        assert longest == sorted(longest, reverse=True) or len(found) == 1


def test_jobs_that_start_at_other_layers_have_batches_of_their_own() -> None:
    lengths = [[5] * 3, [5] * 3, [5] * 2, [5] * 3]
    starts = [9, 2, 4, 5]
    first, third = [(1, 0), (1, 1), (1, 2)], [(0, 0), (0, 1), (0, 2)]
    second = [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]  # two rows alone aren't worth a batch
    assert batches(lengths, 100, starts, 3) == [first, second, third]
    assert len(batches(lengths, 100, starts, 100)) == 1
    assert [len(batch) for batch in batches(lengths, 2, starts, 3)] == [2, 1, 2, 2, 1, 2, 1]


def test_a_job_of_a_late_layer_leaves_out_the_layers_below() -> None:
    lm, n_rows = tiny.language_model("llama"), []
    attention = lm.layers[1].get_submodule("self_attn")
    prompts = tiny.prompts(40)
    early, late = Steer(0, 1, 3.0), Steer(lm.n_layers - 2, 1, 3.0)

    def job(steer: Steer) -> Job:
        saes = {steer.layer: random_sae(steer.layer, lm.d_model)}
        return Job(FixedFeatures([steer], saes, Decay(1.0)), range(40))

    jobs = [job(late), job(early)]
    engine = Engine(lm, EngineConfig(100, 1.0, "eager"))
    store = engine.read(prompts)
    handle = attention.register_forward_hook(lambda *args: n_rows.append(len(args[-1][0])))
    together = engine.generate(store, jobs, 1, choices=[5, 6, 7])
    handle.remove()
    assert n_rows == [40]
    alone = [engine.generate(store, [job], 1, choices=[5, 6, 7])[0].tokens for job in jobs]
    assert [one.tokens for one in together] == alone


@pytest.fixture
def small_memory() -> Iterator[tuple[LanguageModel, list[int]]]:
    """A model whose forward pass fails above 3 rows, but not before the second token."""
    lm = tiny.language_model("llama")
    tried: list[int] = []

    def check(_module, _args, kwargs) -> None:
        n_rows = len(kwargs["input_ids"])
        tried.append(n_rows)
        if n_rows > 3 and kwargs["past_key_values"].get_seq_length(3) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    handle = lm.decoder.register_forward_pre_hook(check, with_kwargs=True)
    yield lm, tried
    handle.remove()


def test_what_does_not_fit_is_halved_and_the_work_is_kept(small_memory, caplog) -> None:
    lm, tried = small_memory
    expected = Engine(tiny.language_model("llama"), EngineConfig(64, 1.0, "eager"))
    jobs = [Job(Unsteered(), range(12))]
    want = expected.generate(expected.read(PROMPTS), jobs, 8)[0]
    made = Engine(lm, EngineConfig("auto", 1.0, "eager"))
    store = made.read(PROMPTS)
    done: list[int] = []
    with caplog.at_level(logging.WARNING):
        got = made.generate(store, jobs, 8, progress=done.append)[0]
    assert got.tokens == want.tokens and got.texts == want.texts
    assert sum(done) == 12, "no row is answered twice"
    assert done == [3, 3, 3, 3]
    assert "12 rows don't fit into memory; going on with 6 at a time" in caplog.text
    assert "6 rows don't fit into memory; going on with 3" in caplog.text
    tried.clear()
    made.generate(store, jobs, 8)
    assert set(tried) <= {1, 2, 3}, "later batches start at the size that did fit"


def test_an_observer_counts_nothing_twice_when_a_batch_is_halved(small_memory) -> None:
    lm, _ = small_memory
    saes = {1: random_sae(1, tiny.D_MODEL)}
    found = []
    for model, size in ((lm, "auto"), (tiny.language_model("llama"), 64)):
        made, observer = Engine(model, EngineConfig(size, 1.0, "eager")), Observer(saes, "mean")
        answered = made.generate(made.read(PROMPTS), [Job(observer, range(12))], 8)[0]
        moments = observer.residuals[1].moments
        found.append((observer.pooled_BF[1], moments.total_F))
        assert moments.n == sum(min(len(tokens) + 1, 8) for tokens in answered.tokens)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_nothing_is_counted_twice_when_encoding_does_not_fit(monkeypatch) -> None:
    """The answers are there by then; of two layers the first has been encoded already."""
    lm, saes = tiny.language_model("llama"), {n: random_sae(n, tiny.D_MODEL) for n in (1, 2)}
    encode, found = LayerSAE.encode, []

    def small(self, x_BD):
        if self.layer == 2 and len(x_BD) > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, x_BD)

    for size, patched in ((64, encode), ("auto", small)):
        monkeypatch.setattr(LayerSAE, "encode", patched)
        made, observer = Engine(lm, EngineConfig(size, 1.0, "eager")), Observer(saes, "mean")
        made.generate(made.read(PROMPTS), [Job(observer, range(12))], 8)
        found.append((observer.residuals, observer.pooled_BF))
    assert made.batch_size.most < 12, "it was halved"
    for layer in saes:
        (a, b), (x, y) = ([each[part][layer] for each in found] for part in (0, 1))
        assert a.moments.n == b.moments.n == len(b.norm_N)
        torch.testing.assert_close(a.moments.total_F, b.moments.total_F, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


VECTOR = FixedVectors({1: torch.ones(tiny.D_MODEL)}, {1: 1}, Decay(1.0))
LOOKS = Observer({n: random_sae(n, tiny.D_MODEL) for n in (1, 2)}, "max")


@pytest.mark.parametrize(
    ("controller", "record", "n_layers"),
    [(Unsteered(), True, 0), (VECTOR, False, 0), (VECTOR, True, 1), (LOOKS, False, 2)],
)
def test_auto_counts_what_is_kept_of_an_answer(controller, record, n_layers, monkeypatch) -> None:
    lm = tiny.language_model("llama")
    made, asked = Engine(lm, EngineConfig("auto", 1.0, "eager")), []
    store = made.read(PROMPTS)
    rows = BatchSize.rows
    monkeypatch.setattr(BatchSize, "rows", lambda *words: asked.append(words[1]) or rows(*words))
    made.generate(store, [Job(controller, range(12))], 8, record=record)
    plain = bytes_to_decode(lm, max(map(len, PROMPTS)) + 8)
    assert asked == [plain + 4 * tiny.D_MODEL * 8 * n_layers]


def test_prompts_are_read_for_a_mask_as_they_fit(monkeypatch) -> None:
    """The memory is not enough at the third prompt of twelve: all come again, in halves."""
    lm, sae = tiny.language_model("llama"), random_sae(2, tiny.D_MODEL)
    allowed_C, found, calls = torch.arange(0, 15), [], []
    encoder = LayerSAE.encoder

    def small(self, feature_C):
        encode = encoder(self, feature_C)

        def encode_or_fail(x_BD):
            calls.append(len(x_BD))
            if len(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return encode(x_BD)

        return encode_or_fail

    for size, patched in ((64, encoder), ("auto", small)):
        store = Engine(lm, EngineConfig(size, 1.0, "eager")).read(PROMPTS)
        assert isinstance(store, PromptStore)
        monkeypatch.setattr(LayerSAE, "encoder", patched)
        found.append(PromptActs(store, list(range(12))).means(sae, allowed_C)[0])
    assert len(calls) == 3 + len(PROMPTS) and store.size.most == 6
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_a_given_number_is_kept_to(small_memory) -> None:
    lm, _ = small_memory
    made = Engine(lm, EngineConfig(8, 1.0, "eager"))
    with pytest.raises(
        UserError, match=r"8 rows .* set engine\.batch_size=4 or engine\.batch_size=auto"
    ):
        made.generate(made.read(PROMPTS), [Job(Unsteered(), range(12))], 8)


def test_one_row_that_does_not_fit_is_told() -> None:
    def play(rows: list[int]) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    with pytest.raises(UserError, match=r"1 rows don't fit into memory .*smaller model"):
        BatchSize("auto").play([[1]], play)


def test_other_errors_are_not_taken_for_a_full_memory() -> None:
    def play(rows: list[int]) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        BatchSize("auto").play([[1, 2]], play)


def test_the_automatic_size_leaves_a_margin(monkeypatch) -> None:
    monkeypatch.setattr(batching, "free_bytes", lambda _: 1_000_000)
    cpu = torch.device("cpu")
    assert BatchSize("auto").rows(10_000, cpu) == 70
    assert BatchSize("auto").rows(10**9, cpu) == 1
    assert BatchSize("auto").rows(1, cpu) == batching.MOST_ROWS
    assert BatchSize(7).rows(10**9, cpu) == 7


def test_free_memory_and_the_estimate_are_of_the_right_order(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(batching, "CGROUP", tmp_path)
    machine = free_bytes(torch.device("cpu"))
    assert 2**26 < machine < 2**46
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert free_bytes(torch.device("cpu")) > 2**26
    (tmp_path / "memory.max").write_text("1005\n")
    assert free_bytes(torch.device("cpu")) == 1000
    lm = tiny.language_model("llama")
    # 4 layers, 2 heads of 8, keys and values, float32, 100 tokens; held twice while gathered.
    assert bytes_to_decode(lm, 100) >= 2 * 2 * 4 * 16 * 4 * 100


@pytest.mark.parametrize("size", ["many", "0", "1.5", "true"])
def test_a_size_that_is_none_is_told(size: str, tiny_files, tmp_path) -> None:
    with pytest.raises(UserError, match=r"engine\.batch_size=.*: must be at least 1, or auto"):
        run_small([*tiny_files.overrides(), f"output_dir={tmp_path}", f"engine.batch_size={size}"])


def test_a_run_with_the_automatic_size(tiny_files, tmp_path) -> None:
    common = [*tiny_files.overrides(), f"output_dir={tmp_path}"]
    auto, _ = run_small([*common, "engine.batch_size=auto"])
    fixed, _ = run_small([*common, "engine.batch_size=16"])
    assert auto["accuracy_steered"] == fixed["accuracy_steered"] and auto["fixed"] == fixed["fixed"]
