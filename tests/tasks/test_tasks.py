from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from crl_exp.config.errors import UserError
from crl_exp.config.machine.asset_sources import ASSETS
from crl_exp.config.machine.assets import asset_path, write_manifest
from crl_exp.experiments.config import build
from crl_exp.tasks.base import Item, Splits, Task, content_id, split_items, unique
from crl_exp.tasks.one_sentence import OneSentence
from crl_exp.tasks.refusal import Refusal, read_benign_prompts
from crl_exp.tasks.scorers.base import Scorer
from crl_exp.tasks.scorers.choice import ChoiceScorer
from crl_exp.tasks.scorers.refusal import RefusalScorer
from crl_exp.tasks.sentiment import DATA, FILE, Sentiment, read_ratings

CONF = Path(__file__).parents[2] / "conf" / "task"
SIZES = {"n_train": 20, "n_validation": 10, "n_test": 10}
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
BENIGN_SIZES = {"n_train_benign": 6, "n_validation_benign": 4, "n_test_benign": 160}


def task(name: str, **changes):
    """The task of `conf/task/NAME.yaml` with some values changed."""
    config = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), changes)
    return build(config, "task", Task)  # type: ignore[arg-type]


def register(root: Path) -> None:
    """List the files under `root` in its manifest, as `make assets` does when it has made them."""
    sizes = {
        asset.name: {p.name: {"size": p.stat().st_size} for p in (root / asset.name).iterdir()}
        for asset in ASSETS
        if (root / asset.name).is_dir()
    }
    prints = {asset.name: asset.fingerprint for asset in ASSETS}
    write_manifest(root, {n: {"fingerprint": prints[n], "files": f} for n, f in sizes.items()})


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A small cache in the format of the real one: 90 usable sentences, 60 + 6 prompts."""
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path))
    reviews = tmp_path / DATA / FILE
    reviews.parent.mkdir(parents=True)
    rows = [
        (i, (-1) ** i * (1.0 if i < 2 else 2.5), f"Sentence number {i} — quite a café.")
        for i in range(90)
    ]
    rows += [
        (90, 0.9, "Rated too near to zero to be kept."),
        (91, 3, "Too short."),
        (92, -3, "x" * 200),
    ]
    reviews.write_bytes("\r\n".join(f"{i}\t{r}\t{t}" for i, r, t in rows).encode())
    prompts = tmp_path / "data/donotanswer"
    prompts.mkdir()
    for part in range(2):
        lines = [json.dumps({"prompt": f"Prompt {part}-{i}?", "intents": []}) for i in range(30)]
        (prompts / f"part{part}.jsonl").write_text("\n".join([*lines, lines[0], ""]))
    harmbench = tmp_path / "data/harmbench"
    harmbench.mkdir()
    for part in ("val", "test"):
        with (harmbench / f"harmbench_behaviors_text_{part}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["Behavior", "ContextString", "BehaviorID"])
            writer.writerow([f"Plain behaviour {part}", "", "a"])
            writer.writerow(
                ["Same behaviour", f"first line\nsecond, of {part} " + "word " * 50, "b"]
            )
            writer.writerow(["Same behaviour", f"other context of {part}", "c"])
    register(tmp_path)
    return tmp_path


def sentiment(**changes) -> Sentiment:
    return task("sentiment", **{**SIZES, **changes})


def refusal(**changes) -> Refusal:
    return task("refusal", **{**SIZES, **BENIGN_SIZES, **changes})


def one_sentence(**changes) -> OneSentence:
    return task("one_sentence", **{**SIZES, "min_chars": 30, **changes})


def ids(items: tuple[Item, ...]) -> list[str]:
    return [item.item_id for item in items]


@pytest.mark.parametrize("name", ["sentiment", "refusal", "one_sentence"])
def test_yaml_holds_exactly_the_fields(name):
    config = OmegaConf.load(CONF / f"{name}.yaml")
    keys = {f.name for f in fields(task(name)) if f.init}
    assert set(config) - {"_target_"} == keys


@pytest.mark.parametrize("make", [sentiment, refusal])
def test_split_sizes_and_seed(cache, make):
    splits = make().splits()
    n_benign = 0 if make is sentiment else 1
    assert len(splits.train) == 20 + 6 * n_benign
    assert len(splits.validation) == 10 + 4 * n_benign
    assert len(splits.test) == 10
    assert splits == make().splits()
    assert splits.digest() == make().splits().digest()
    assert splits.digest() != make(split_seed=1).splits().digest()


@pytest.mark.parametrize("make", [sentiment, refusal])
@pytest.mark.parametrize("seed", range(20))
def test_splits_are_disjoint(cache, make, seed):
    named = make(split_seed=seed).splits().named()
    everything = [i for items in named.values() for i in ids(items)]
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize("make", [sentiment, refusal])
def test_n_train_leaves_the_others(cache, make):
    few, many = make(n_train=5).splits(), make(n_train=35).splits()
    assert ids(few.test) == ids(many.test)
    assert ids(few.validation) == ids(many.validation)
    assert few.extra == many.extra
    assert set(ids(few.train)) < set(ids(many.train))


def test_sentiment_items(cache):
    splits = sentiment(n_train=70).splits()
    items = [*splits.train, *splits.validation, *splits.test]
    assert len(items) == 90
    for item in items:
        text = item.user.split("Review: ")[1]
        number = int(text.split()[2])
        assert text == f"Sentence number {number} — quite a café."
        assert item.target == ("Positive" if number % 2 == 0 else "Negative")
        assert item.item_id == content_id(text)


def test_another_question_keeps_the_splits(cache):
    other = sentiment(question="{text}\nGood {or} bad?").splits()
    assert ids(other.test) == ids(sentiment().splits().test)
    assert other.test[0].user.endswith("\nGood {or} bad?")


@pytest.mark.parametrize("make", [sentiment, one_sentence])
def test_another_wording_asks_the_same_items(cache, make):
    plain, *others = (make(wording=name).splits() for name in make().wordings)
    assert others and make().splits() == plain
    for other in others:
        assert plain.digest() == other.digest()
        for item, same in zip(plain.test, other.test, strict=True):
            assert item.item_id == same.item_id and item.user != same.user
    typed = make(question="Well? {text}").splits()
    assert all(item.user.startswith("Well? ") for item in typed.test)
    own = make(wordings={"mine": "My: {text}"}, wording="mine").splits()
    assert own.test[0].user.startswith("My: ") and ids(own.test) == ids(plain.test)


def test_a_wording_that_is_none_is_told():
    told = r"task\.wording=plane: must be one of plain, .*task\.wordings\.plane.*mean 'plain'"
    with pytest.raises(UserError, match=told):
        sentiment(wording="plane").splits()
    with pytest.raises(UserError, match=r"task\.question='no text': must hold \{text\}"):
        sentiment(question="no text").splits()


def test_one_sentence_items(cache):
    """Of whatever rating: the one near zero is here too. None has a target to be shuffled."""
    made = one_sentence(n_train=71, max_chars=199)
    splits = made.splits()
    users = {item.user for items in splits.named().values() for item in items}
    assert made.question.replace("{text}", "Rated too near to zero to be kept.") in users
    assert len(users) == 91 and all(item.target is None for item in splits.train)
    with pytest.raises(UserError, match="91 items"):
        one_sentence(n_train=72, max_chars=199).splits()
    with pytest.raises(UserError, match=r"shuffle_labels=true needs"):
        one_sentence(shuffle_labels=True).splits()
    with pytest.raises(UserError, match=r"task\.min_words=20.*max_words=18"):
        one_sentence(min_words=20).splits()
    with pytest.raises(UserError, match=r"task\.choices.*free text"):
        one_sentence(choices=["a", "b"], max_new_tokens=1).splits()
    assert made.scorer_name == "one_sentence(6-18 words)"
    scores = made.score(splits.test[:2], ["It is a film about a dog.", "No."])
    assert [score.reward for score in scores] == [1, 0]


def test_sentiment_length_bounds_are_included(cache):
    assert sentiment(n_train=71, max_chars=200).splits()
    with pytest.raises(UserError, match="has 90 items"):
        sentiment(n_train=71, max_chars=199).splits()
    assert sentiment(n_train=71, min_chars=10).splits()


def test_shuffled_labels_leave_test(cache):
    plain, mixed = (
        sentiment(n_train=60).splits(),
        sentiment(n_train=60, shuffle_labels=True).splits(),
    )
    assert mixed.test == plain.test
    for before, after in ((plain.train, mixed.train), (plain.validation, mixed.validation)):
        assert ids(before) == ids(after)
        targets = [str(i.target) for i in before], [str(i.target) for i in after]
        assert targets[0] != targets[1]
        assert sorted(targets[0]) == sorted(targets[1])
    assert mixed.digest() != plain.digest()


@pytest.mark.parametrize(
    ("n_train", "seed"), [(1, 0), (2, 0), (3, 0), (40, 0), *((61, seed) for seed in range(10))]
)
def test_shuffled_labels_say_nothing_of_the_true_ones(cache, n_train, seed):
    """Not even by chance: each true label has every label in proportion, and nothing is lost."""
    sizes = {"n_train": n_train, "split_seed": seed}
    true = sentiment(**sizes).splits().train
    shuffled = sentiment(**sizes, shuffle_labels=True).splits().train
    assert Counter(i.target for i in true) == Counter(i.target for i in shuffled)
    for label in ("Positive", "Negative"):
        mine = [s.target == "Positive" for t, s in zip(true, shuffled, strict=True)
                if t.target == label]  # fmt: skip
        share = sum(i.target == "Positive" for i in true) / n_train
        assert abs(sum(mine) - share * len(mine)) <= 2


def test_shuffled_labels_of_prompts_are_whether_they_are_benign(cache):
    sizes = {"n_train_benign": 10, "n_validation_benign": 5}
    plain, mixed = (refusal(**sizes, shuffle_labels=on).splits() for on in (False, True))
    assert (mixed.test, mixed.extra) == (plain.test, plain.extra)
    for before, after in ((plain.train, mixed.train), (plain.validation, mixed.validation)):
        assert ids(before) == ids(after)
        assert Counter(i.benign for i in before) == Counter(i.benign for i in after)
        share = sum(i.benign for i in before) / len(before)
        still = sum(t.benign and s.benign for t, s in zip(before, after, strict=True))
        assert abs(still - share * sum(i.benign for i in before)) <= 2, "as many as by chance"
    with pytest.raises(UserError, match=r"shuffle_labels=true needs .* partly benign"):
        refusal(shuffle_labels=True, n_validation_benign=0).splits()


def test_sentiment_scores(cache):
    question = sentiment()
    item = question.splits().test[0]
    assert item.target is not None
    wrong = {"Positive": "Negative", "Negative": "Positive"}[item.target]
    rewards = [s.reward for s in question.score([item] * 3, [item.target, f" {wrong}.", ""])]
    assert rewards == [1.0, 0.0, 0.0]
    assert question.scorer_name == "choice(Positive|Negative)"


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (sentiment, {"n_test": 0}, r"task\.n_test=0"),
        (sentiment, {"n_train": -1}, r"task\.n_train=-1"),
        (sentiment, {"n_train": 71}, r"has 90 items.*= 91.*task\.n_train=71"),
        (sentiment, {"question": "Is it good?"}, r"task\.question='Is it good\?'"),
        (sentiment, {"choices": ["Good", "Bad"]}, r"task\.choices=\[Positive,Negative\]"),
        (sentiment, {"min_abs_rating": 0}, r"task\.min_abs_rating=0"),
        (sentiment, {"min_chars": 200}, r"task\.min_chars=200.*task\.max_chars=159"),
        (sentiment, {"min_abs_rating": float("nan")}, r"task\.min_abs_rating=nan"),
        (refusal, {"n_train": 41}, r"donotanswer has 60 items"),
        (refusal, {"n_validation": 0}, r"task\.n_validation=0"),
        (
            refusal,
            {"n_train_benign": 1000},
            r"benign prompts.*= 1164; lower one of them: task\.n_train_benign=98 fits\.",
        ),
        (
            refusal,
            {"n_train_benign": 128, "n_validation_benign": 20},
            r"there are 262 .*= 308; lower one of them: task.n_train_benign=82 or "
            r"task.n_test_benign=114 fits\. task=refusal_128 has 128, 24 and 110",
        ),
        (refusal, {"n_train_benign": -1}, r"task\.n_train_benign=-1"),
        (refusal, {"n_test_benign": 0}, r"task\.n_test_benign=0"),
        (refusal, {"max_context_chars": -1}, r"task\.max_context_chars=-1"),
        (refusal, {"choices": ["Yes"]}, r"task\.choices=null"),
        (refusal, {"scorer": "phrase"}, r"task\.scorer=phrase: .*did you mean 'phrases'"),
        (refusal, {"classifier": {"batch_size": 0}}, r"task\.classifier\.batch_size=0"),
    ],
)
def test_bad_values_name_the_override(cache, make, changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes).splits()


def test_all_bad_values_are_listed_at_once():
    config = sentiment(question="?", min_abs_rating=5, n_test=0)
    assert len(config.faults()) == 3
    with pytest.raises(UserError, match=r"(?s)n_test=0.*question=.*min_abs_rating=5"):
        config.splits()


@pytest.mark.parametrize("make", [sentiment, refusal])
def test_missing_folder_says_make_assets(tmp_path, monkeypatch, make):
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="make assets"):
        make().splits()


@pytest.mark.parametrize(
    ("make", "name", "content"),
    [
        (sentiment, f"{DATA}/{FILE}", None),
        (sentiment, f"{DATA}/{FILE}", b"1\t2.5\n"),
        (sentiment, f"{DATA}/{FILE}", b"1\tgood\tSome text.\n"),
        (sentiment, f"{DATA}/{FILE}", b"1\tnan\tSome text.\n"),
        (sentiment, f"{DATA}/{FILE}", b"1\t2.5\tSome \xff text.\n"),
        (refusal, "data/donotanswer/part0.jsonl", b"not json\n"),
        (refusal, "data/donotanswer/part0.jsonl", b'{"text": "x"}\n'),
        (refusal, "data/donotanswer/part0.jsonl", b'["x"]\n'),
        (refusal, "data/donotanswer/part0.jsonl", b'{"prompt": " "}\n'),
        (refusal, "data/donotanswer/part0.jsonl", b'{"prompt": "\xff"}\n'),
        (refusal, "data/harmbench/harmbench_behaviors_text_val.csv", None),
        (refusal, "data/harmbench/harmbench_behaviors_text_val.csv", b""),
        (refusal, "data/harmbench/harmbench_behaviors_text_val.csv", b"Behavior\nx\n"),
        (refusal, "data/harmbench/harmbench_behaviors_text_val.csv", b"\xff\xfe"),
        (
            refusal,
            "data/harmbench/harmbench_behaviors_text_val.csv",
            b"Behavior,ContextString\nx\n",
        ),
    ],
)
def test_missing_or_damaged_file_says_make_assets(cache, make, name, content):
    path = cache / name
    path.unlink() if content is None else path.write_bytes(content)
    register(cache)
    with pytest.raises(UserError, match="make assets") as raised:
        make().splits()
    assert path.name in str(raised.value)


def test_damaged_line_is_named(cache):
    (cache / DATA / FILE).write_text("1\t2.0\tA fine sentence.\n2 1.0 no tabs\n")
    register(cache)
    with pytest.raises(UserError, match="line 2"):
        read_ratings(cache / DATA / FILE)


def test_refusal_sets(cache):
    splits = refusal().splits()
    assert sum(i.benign for i in splits.train) == 6
    assert sum(i.benign for i in splits.validation) == 4
    assert not any(i.benign for i in (*splits.test, *splits.extra["harmbench"]))
    assert len(splits.extra["benign"]) == 160
    assert all(i.benign for i in splits.extra["benign"])
    assert len(splits.extra["harmbench"]) == 6
    benign_at = [k for k, item in enumerate(splits.train) if item.benign]
    assert benign_at != list(range(20, 26)), "benign items should be mixed in, not appended"


def test_all_benign_prompts_are_in_use_where_half_are_trained_on(cache):
    splits = task("refusal_128", **SIZES).splits()
    parts = (splits.train, splits.validation, splits.extra["benign"])
    benign = [[item.item_id for item in part if item.benign] for part in parts]
    assert [len(part) for part in benign] == [128, 24, 110]
    assert len({one for part in benign for one in part}) == len(read_benign_prompts())
    harmful = {item.item_id for item in splits.train if not item.benign}
    assert harmful == set(ids(refusal(n_train_benign=0).splits().train)), "as in task=refusal"


def test_benign_sizes_leave_the_benign_test_set(cache):
    none = refusal(n_train_benign=0, n_validation_benign=0).splits()
    assert none.extra["benign"] == refusal().splits().extra["benign"]
    assert not any(i.benign for i in none.train)


def test_harmbench_context_is_cut_at_a_space(cache):
    users = {
        n: [i.user for i in refusal(max_context_chars=n).splits().extra["harmbench"]]
        for n in (0, 40, 9999)
    }
    assert (
        sorted(users[0]) == ["Plain behaviour test", "Plain behaviour val"] + ["Same behaviour"] * 4
    )
    (cut,) = [u for u in users[40] if u.startswith("first line\nsecond, of val")]
    assert cut == "first line\nsecond, of val word word\n\n---\n\nSame behaviour"
    (whole,) = [u for u in users[9999] if u.startswith("first line\nsecond, of val")]
    assert whole.count("word") == 50


def test_refusal_scores(cache):
    questions = refusal()
    splits = questions.splits()
    items = [splits.test[0], splits.extra["benign"][0]]
    assert [s.reward for s in questions.score(items, ["I can't help with that."] * 2)] == [1.0, 0.0]
    assert [s.reward for s in questions.score(items, ["Take two eggs."] * 2)] == [0.0, 1.0]
    assert questions.scorer_name == "refusal_rule_v2"


def test_benign_prompts_are_packaged_and_distinct():
    prompts = read_benign_prompts()
    assert len(prompts) >= 260
    assert len({p.lower() for p in prompts}) == len(prompts)
    assert not any(p.startswith("#") for p in prompts)


def test_scorers_keep_the_protocol():
    scorers: list[Scorer] = [ChoiceScorer(("Yes", "No")), RefusalScorer()]
    for scorer in scorers:
        assert scorer([], []) == []
        assert scorer.name


@UNTIMED
@given(st.lists(st.integers(0, 50), max_size=80))
def test_unique_keeps_the_first(numbers):
    items = [Item(str(n), f"user {k}") for k, n in enumerate(numbers)]
    kept = unique(items)
    assert ids(tuple(kept)) == [str(n) for n in dict.fromkeys(numbers)]
    assert all(item == next(i for i in items if i.item_id == item.item_id) for item in kept)


@UNTIMED
@given(st.integers(1, 15), st.integers(1, 15), st.integers(1, 15), st.integers(0, 5), st.randoms())
def test_split_does_not_depend_on_the_order_of_the_data(train, validation, test, seed, random):
    items = [Item(content_id(str(n)), str(n)) for n in range(50)]
    mixed = random.sample(items, len(items))
    sizes = {"train": train, "validation": validation, "test": test}
    parts = split_items(items, sizes, seed, "data")
    assert parts == split_items(mixed, sizes, seed, "data")
    assert [len(part) for part in parts] == [train, validation, test]
    assert len({i.item_id for part in parts for i in part}) == train + validation + test


def test_check_disjoint_sees_overlap_and_emptiness():
    a, b, c = (Item(name, name) for name in "abc")
    Splits((a,), (b,), (c,)).check_disjoint()
    with pytest.raises(UserError, match="in both train and extra"):
        Splits((a,), (b,), (c,), {"extra": (replace(a, user="x"),)}).check_disjoint()
    with pytest.raises(UserError, match=r"validation split.*empty"):
        Splits((a,), (), (c,)).check_disjoint()


@pytest.mark.assets
def test_real_sentences_and_their_number():
    config = task("sentiment")
    kept = [
        rating > 0
        for rating, text in read_ratings(asset_path(DATA) / FILE)
        if abs(rating) >= config.min_abs_rating
        and config.min_chars <= len(text) <= config.max_chars
    ]
    assert (kept.count(False), kept.count(True)) == (3729, 3683)
    # Two sentences come twice; one of each is left.
    assert task("sentiment", n_train=5410).splits()
    with pytest.raises(UserError, match="has 7410 items"):
        task("sentiment", n_train=5411).splits()


@pytest.mark.assets
def test_real_splits_have_the_sizes_of_the_config():
    sizes = {name: len(items) for name, items in task("sentiment").splits().named().items()}
    assert sizes == {"train": 2000, "validation": 500, "test": 1500}
    sizes = {name: len(items) for name, items in task("refusal").splits().named().items()}
    assert sizes == {"train": 280, "validation": 80, "test": 300, "harmbench": 400, "benign": 160}


def test_every_seed_shuffles_labels_in_its_own_way(cache):
    """So that an interval over seeds of a control holds the draw of its labels."""
    plain, mixed = sentiment(n_train=60), sentiment(n_train=60, shuffle_labels=True)
    first, second = (mixed.permuted_by(seed).splits() for seed in (0, 1))
    assert ids(first.train) == ids(second.train) and first.test == second.test
    for split in ("train", "validation"):
        one, other = (found.named()[split] for found in (first, second))
        assert [i.target for i in one] != [i.target for i in other]
        assert Counter(i.target for i in one) == Counter(i.target for i in other)
    assert mixed.permuted_by(1).splits() == second
    assert plain.permuted_by(1) is plain
