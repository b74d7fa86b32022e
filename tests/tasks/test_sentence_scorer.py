"""Which answers are one whole sentence; `scorers.sentence` says what the rule does."""

from __future__ import annotations

import pytest

from crl_exp.tasks.base import Item, Score
from crl_exp.tasks.scorers.sentence import SentenceScorer

RULE = SentenceScorer(6, 18)
WHOLE = [
    "This review is about a subtle variation on a classic.",
    "  The film is about a well-made heist.\n",
    "It's a film that doesn't know what it wants!",
    "What is a film about a dog for?",
    "The film – a slow one – is about war.",
    "The review, which is long, calls it (rightly) a mess.",
    "Élodie is the heroine of this little film.",
    'A review of "Jaws" that praises its shark and its crew.',
    "One two three four five six.",
    " ".join(["Word"] * 18) + ".",
    "The film leaves you wondering what it was for…",
]
NOT_WHOLE = [
    ("", "empty"),
    (" \n", "blank"),
    ("this review is about a subtle variation on a classic.", "no capital"),
    ("1. This review is about a subtle variation.", "a list; a digit first"),
    ("- This review is about a subtle variation.", "a bullet"),
    ('"This review is about a subtle variation."', "a quote first, and one behind the mark"),
    ('The review calls the film "a subtle variation."', "a quote behind the mark"),
    ("This review is about a subtle variation on a", "cut off"),
    ("This review is about a subtle variation,", "ends in a comma"),
    ("This review is about a film. It is good.", "two sentences"),
    ("This review is about a subtle variation...", "three dots are three marks"),
    ("Is this review about a subtle variation?!", "two marks"),
    ("The film by Mr. Smith is about a war.", "an abbreviation"),
    ("The film gets 3.5 stars from the reviewer.", "a decimal"),
    ("The film is about the U.S. in war.", "an abbreviation"),
    ("One two three four five.", "five words"),
    ("One two three - four five.", "a dash is no word"),
    (" ".join(["Word"] * 19) + ".", "nineteen words"),
    ("This review is about a film:\n\nA slow one.\nBad.", "two lines, two marks"),
    ("*This* review is about a subtle variation.", "markup first"),
]


@pytest.mark.parametrize("answer", WHOLE)
def test_whole(answer):
    assert RULE.whole(answer)


@pytest.mark.parametrize(("answer", "why"), NOT_WHOLE)
def test_not_whole(answer, why):
    assert not RULE.whole(answer), why


def test_scores_and_what_is_valid():
    items = [Item(str(i), "") for i in range(3)]
    assert RULE(items, [WHOLE[0], "No", " "]) == [Score(1), Score(0), Score(0, valid=False)]
    assert RULE.name == "one_sentence(6-18 words)"
