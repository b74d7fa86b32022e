"""Awkward outputs, by hand: what a letter, a number and shared words are read from."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crl_exp.tasks.base import Item, Score
from crl_exp.tasks.scorers.letter import LetterScorer, read_letter
from crl_exp.tasks.scorers.number import NumberScorer, numbers, read_number
from crl_exp.tasks.scorers.token_f1 import TokenF1Scorer, token_f1, words

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Read with the letters A to D, unless a number of options is given.
LETTER = [
    ("B", "B"),
    (" B", "B"),
    ("B.", "B"),
    ("b", "B"),
    ("b.", "B"),
    ("(b)", "B"),
    ("(B)", "B"),
    ("B)", "B"),
    ("B) because", "B"),
    ("B because it is warmer", "B"),
    ("B. Paris", "B"),
    ("B: Paris", "B"),
    ("B\n\nParis is the capital.", "B"),
    ("\n\nB", "B"),
    ("**B**", "B"),
    ("**B.** Paris", "B"),
    ("[C]", "C"),
    ('"D"', "D"),
    ("$\\boxed{B}$", "B"),
    ("\\boxed{\\text{C}}", "C"),
    ("A", "A"),
    ("A. A cat", "A"),
    ("A is right.", "A"),
    ("A) because it says so", "A"),
    ("a)", "A"),
    ("The answer is B.", "B"),
    ("The answer is (B).", "B"),
    ("The answer is: **C**", "C"),
    ("the answer is b.", "B"),
    ("Answer: D", "D"),
    ("ANSWER: (a)", "A"),
    ("Answer:\nB", "B"),
    ("The correct option is C, since A and B are too low.", "C"),
    ("The correct answer would be option D", "D"),
    ("The best choice is A", "A"),
    ("A. Too low. B. Right. So the answer is B.", "B"),
    ("The answer is A. No, wait: the answer is C.", "C"),
    ("Option A is wrong, so the answer is B", "B"),
    ("I choose B.", "B"),
    ("I think C because of the heat", "C"),
    ("It is D.", "D"),
    ("I would go with option C", "C"),
    ("Let me see. It must be (C).", "C"),
    ("B\n\nQuestion: What else?\nA. x\nAnswer: C", "B"),
    ("", None),
    ("   \n", None),
    (".", None),
    ("E", None),
    ("The answer is E.", None),
    ("Paris", None),
    ("A cat sat on the mat.", None),
    ("A person would say so", None),
    ("Because it is warm", None),
    ("Both (A) and (C)", None),
    ("Option A or option B", None),
    ("I can't help with that.", None),
    ("It's a good question", None),
    ("Vitamin C", None),
    ("AB", None),
    ("B-vitamins", None),
    ("Don't know", None),
    ("The answer is not A", None),
    ("The answer is a matter of taste", None),
]
MORE_OPTIONS = [
    ("J", 10, "J"),
    ("(j)", 10, "J"),
    ("I", 10, "I"),
    ("I. All of them", 10, "I"),
    ("Answer: I", 10, "I"),
    ("I think that E is meant", 10, None),
    ("I think E.", 10, "E"),
    ("I'm sorry, I can't", 10, None),
    ("K", 10, None),
    ("C", 3, "C"),
    ("D", 3, None),
    ("Answer: D", 3, None),
    ("B", 2, "B"),
    ("C", 2, None),
]
NUMBER = [
    ("1,234", "1234"),
    ("1234", "1234"),
    ("1234.0", "1234"),
    ("$1,234", "1234"),
    ("1,234,567", "1234567"),
    ("$18", "18"),
    ("18.00", "18"),
    ("18.", "18"),
    ("18%", "18"),
    ("18 dollars", "18"),
    ("-3", "-3"),
    ("−3", "-3"),
    ("-$3", "-3"),
    ("$-3", "-3"),
    ("= -3.50", "-3.5"),
    ("5-3", "3"),
    ("(10)-3", "3"),
    ("- 3 eggs", "3"),
    ("€2.50", "2.5"),
    (".5", "0.5"),
    ("0.5", "0.5"),
    ("1e3", "1000"),
    ("12eggs", "12"),
    ("#### 18", "18"),
    ("####18", "18"),
    ("#### $1,234.00", "1234"),
    ("#### -3", "-3"),
    ("She has 3 and 4, so 7.\n#### 7", "7"),
    ("#### 18\n\nQuestion: 5 eggs?\nAnswer: 5\n#### 5", "18"),
    ("The answer is 18. It took 2 steps", "2"),
    ("3 + 4 = 7", "7"),
    ("so 18 ####", "18"),
    ("**18**", "18"),
    ("\\boxed{18}", "18"),
    ("1, 2 and 3", "3"),
    ("1,23", "23"),
    ("1,2345", "2345"),
    ("007", "7"),
    ("", None),
    ("####", None),
    ("eighteen", None),
    ("I can't answer that.", None),
    ("-", None),
    ("$", None),
    ("...", None),
]
F1 = [
    ("Paris", "Paris", 1.0),
    ("paris.", "Paris", 1.0),
    ("The Paris", "Paris", 1.0),
    ("It is Paris", "Paris", 0.5),  # P = 1/3, R = 1
    ("Marie Curie", "Marie Skłodowska Curie", 0.8),  # P = 1, R = 2/3
    ("New New York", "New York", 0.8),  # each word counts once: P = 2/3, R = 1
    ("London", "Paris", 0.0),
    ("", "Paris", 0.0),
    ("the", "Paris", 0.0),
    ("1,234", "1234", 1.0),
    ("U.S.A.", "USA", 1.0),
    ("I can't help with that.", "Paris", 0.0),
    ("March 4, 1918", "4 March 1918", 1.0),
]


@pytest.mark.parametrize(("output", "letter"), LETTER)
def test_a_letter_is_read(output, letter):
    assert read_letter(output, 4) == letter


@pytest.mark.parametrize(("output", "n_options", "letter"), MORE_OPTIONS)
def test_only_letters_of_options_are_read(output, n_options, letter):
    assert read_letter(output, n_options) == letter


def test_letter_scores_take_the_items_own_number_of_options():
    scorer = LetterScorer(4)
    items = [Item("a", "", target="B"), Item("b", "", target="B", n_options=3)]
    assert scorer(items, ["C", "C"]) == [Score(0.0), Score(0.0)]
    assert scorer(items, ["D", "D"]) == [Score(0.0), Score(0.0, valid=False)]
    assert scorer(items, [" B", "(b)"]) == [Score(1.0), Score(1.0)]
    assert scorer.name == "letter(A-D)"


@pytest.mark.slow
@UNTIMED
@given(st.text(max_size=60), st.integers(2, 10))
def test_any_text_is_read_as_one_of_the_letters_or_none(output, n_options):
    assert read_letter(output, n_options) in [None, *"ABCDEFGHIJ"[:n_options]]


@pytest.mark.parametrize(("output", "number"), NUMBER)
def test_a_number_is_read(output, number):
    assert read_number(output) == (None if number is None else Decimal(number))


def test_number_scores():
    items = [Item("a", "", target=target) for target in ("1234", "$1,234", "18", "-3")]
    assert NumberScorer()(items, ["1,234", "1234.0", "", "3"]) == [
        Score(1.0), Score(1.0), Score(0.0, valid=False), Score(0.0),
    ]  # fmt: skip


@UNTIMED
@given(st.integers(-(10**9), 10**9))
def test_a_number_is_read_however_it_is_written(n):
    for text in (f"{n}", f"{n:,}", f"{n}.00", f"so it is {n}.", f"#### {n:,}\n\nQ: 5"):
        assert read_number(text) == n


@UNTIMED
@given(st.text(max_size=60))
def test_numbers_of_any_text_are_finite(text):
    assert all(number.is_finite() for number in numbers(text))


@pytest.mark.parametrize(("output", "target", "f1"), F1)
def test_words_are_shared(output, target, f1):
    assert token_f1(output, target) == pytest.approx(f1)


def test_token_f1_scores():
    items = [Item("a", "", target="Paris")] * 3
    assert TokenF1Scorer()(items, ["It is Paris", "London", "the …"]) == [
        Score(0.5), Score(0.0), Score(0.0, valid=False),
    ]  # fmt: skip


@UNTIMED
@given(st.text(max_size=40), st.text(max_size=40))
def test_f1_is_symmetric_and_in_the_unit_interval(one, other):
    f1 = token_f1(one, other)
    assert f1 == pytest.approx(token_f1(other, one)) and 0 <= f1 <= 1
    assert token_f1(one, one) == (1.0 if words(one) else 0.0)
