"""Options that are other ones for each item: chosen as by running each whole, whoever is beside."""

from __future__ import annotations

import pytest

from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.generation.engine import Engine, EngineConfig, Job
from crl_exp.generation.results import Generation, Step
from crl_exp.models.choice import ItemOptions, Options, continued
from tests.helpers import tiny
from tests.helpers.tiny_steering import AddVector
from tests.models.test_options_tokens import best, engine, model, vectors

PROMPTS = tiny.prompts(7)
EACH = (
    Options(((11, 12, 13), (20,), (11, 31)), texts=("a", "b", "c")),
    Options(((30,), (31,)), texts=("a", "b")),  # no row of it is read on
    Options(((40, 41), (42, 43), (44, 45), (46, 47)), divisors=(3, 9, 2, 5), texts=tuple("abcd")),
    Options(((50, 51, 52, 53), (21, 22)), length_normalised=True, texts=("a", "b")),
    Options(((33,), (34, 35), (36,)), texts=("a", "b", "c")),
    Options(((11,), (12,), (13,)), divisors=(1, 7, 2), texts=("a", "b", "c")),
    Options(((23, 24), (25,)), texts=("a", "b")),
)
"""Of one token to four, two options to four; over 1, their tokens, or numbers of the task's."""


def over_best(prompt: list[int], added: dict, options: Options) -> int:
    """Running each option whole; the division is written out here."""
    plain = [best_score(prompt, added, ids) for ids in options.ids]
    over = options.divisors or (1,) * len(plain)
    if options.length_normalised:
        over = tuple(len(ids) for ids in options.ids)
    scores = [score / n for score, n in zip(plain, over, strict=True)]
    return scores.index(max(scores))


def best_score(prompt: list[int], added: dict, ids: tuple[int, ...]) -> float:
    from tests.models.test_options_tokens import whole

    return whole(model("llama"), prompt, added, ids)[0]


def answers(controllers: list[Controller], size: int, record: bool = False) -> list[Generation]:
    made = engine("llama", size)
    read = made.read(PROMPTS, options=EACH)
    jobs = [Job(one, range(len(PROMPTS))) for one in controllers]
    return made.generate(read, jobs, 1, ItemOptions.made({"test": EACH}), record=record)


@pytest.mark.parametrize("keep_gib", [1.0, 0.0])
def test_each_item_takes_the_best_of_its_own_options(keep_gib):
    """In batches of all rows, some, and one; from prompts that are kept, and read anew."""
    plans = [{}, vectors(1, -1), vectors(2, 1), vectors(3, 0, 2)]
    expected = [
        [over_best(p, plan, own) for p, own in zip(PROMPTS, EACH, strict=True)] for plan in plans
    ]
    assert len({tuple(row) for row in expected}) > 1, "the answers tell nothing apart"
    for size in (64, 11, 1):
        made = Engine(model("llama"), EngineConfig(size, keep_gib, "eager"))
        jobs = [Job(AddVector(p) if p else Unsteered(), range(len(PROMPTS))) for p in plans]
        jobs[2] = Job(jobs[2].controller, [6, 2, 2, 1])
        read = made.read(PROMPTS, options=EACH)
        found = made.generate(read, jobs, 1, ItemOptions.made({"test": EACH}))
        for row, job, one in zip(expected, jobs, found, strict=True):
            assert one.tokens == [list(EACH[item].ids[row[item]]) for item in job.items]
            assert one.texts == [EACH[item].texts[row[item]] for item in job.items]


def test_where_all_items_have_the_same_options_it_is_as_if_they_were_shared():
    """Answers, and what was added at which token of which option, to the bit."""
    shared = Options(((11, 12), (21, 31), (20,), (33, 34, 35)), texts=("a", "b", "c", "d"))
    made, n = engine("llama", 16), len(PROMPTS)
    jobs = [Job(AddVector(vectors(seed, 0, 2)), range(n)) for seed in (1, 2)]
    was = made.generate(made.read(PROMPTS), jobs, 1, shared, record=True)
    own = (shared,) * n
    now = made.generate(
        made.read(PROMPTS, options=own), jobs, 1, ItemOptions.made({"x": own}), record=True
    )
    for one, other in zip(was, now, strict=True):
        assert one.tokens == other.tokens and one.texts == other.texts
        for mine, theirs in ((one.steps, other.steps), (one.others, other.others)):
            assert [told(step) for step in mine] == [told(step) for step in theirs]


def told(step: Step) -> tuple:
    assert step.token_B is not None
    return (step.layer, step.token_index, step.option, step.rows, step.token_B.tolist(),
            step.action.delta_BD.tolist())  # fmt: skip


def test_what_is_recorded_is_of_each_items_own_tokens():
    (found,) = answers([AddVector(vectors(1, 1))], 64, record=True)
    fed: dict[int, list[int]] = {row: [] for row in range(len(PROMPTS))}
    for step in found.steps:
        assert step.token_B is not None
        for row, token in zip(step.rows, step.token_B.tolist(), strict=True):
            fed[row].append(token)
    assert [fed[row] for row in sorted(fed)] == found.tokens
    elsewhere = {(row, step.option) for step in found.others for row in step.rows}
    for row, (own, taken) in enumerate(zip(EACH, found.tokens, strict=True)):
        left = {o for o, ids in enumerate(own.ids) if list(ids) != taken and len(ids) > 1}
        assert {option for at, option in elsewhere if at == row} == left


def test_a_shared_best_is_as_the_other_test_has_it():
    """`over_best` against the reference for options of all items."""
    options = Options(((11, 12), (21, 31), (20, 60)))
    for prompt in PROMPTS:
        assert over_best(prompt, {}, options) == best(model("llama"), prompt, {}, options)


def test_an_option_that_adds_no_token_to_its_prompt_is_refused():
    assert continued([1, 2, 3], 2, " a", "tiny") == (3,)
    with pytest.raises(UserError, match="adds no token of tiny"):
        continued([1, 2], 2, " ", "tiny")


def test_other_options_are_another_thing_to_ask():
    alike = ItemOptions.made({"test": EACH})
    assert alike == ItemOptions.made({"test": EACH}) and hash(alike) is not None
    others = (*EACH[:-1], Options(((23, 24), (26,)), texts=("a", "b")))
    assert alike != ItemOptions.made({"test": others})
    assert alike.longest == 4 and alike.n_longer == 4
