"""A task from one's own file: questions, the right answer of each, and how answers are scored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.files import content_key, home
from crl_exp.config.own_code import name_fault, source_digest
from crl_exp.config.sections import fill
from crl_exp.tasks.base import Item, Score, Splits, content_id, of_groups, unique
from crl_exp.tasks.choice_task import ChoiceTask
from crl_exp.tasks.data.files import json_line, users_text
from crl_exp.tasks.own import shares
from crl_exp.tasks.own.answer_kinds import KINDS, WRITTEN
from crl_exp.tasks.own.function import FunctionScorer
from crl_exp.tasks.own.judge import Judge, JudgeConfig
from crl_exp.tasks.own.preference_model import PreferenceModel, PreferenceScorer, digest_of
from crl_exp.tasks.scorers.base import Scorer
from crl_exp.tasks.scorers.choice import ChoiceScorer

SCORERS = ("answer", "function", "judge", "preference_model")
_COUNTED: dict[str, int] = {}
"""Items of a file, by its state and how it is read: once for all points of a sweep."""


@dataclass
class JsonLines(ChoiceTask):
    """Questions from a file, a JSON object a line.

    Lines are {"question": …, "answer": …}; one may name its `group` (a text), by which results are
    told apart and `task.groups` chooses. The sizes `n_train`, `n_validation` and `n_test` may be
    shares of the file (.6) or null: docs/tasks.md.

    path: the file. template: the user turn; `{question}` stands for the question.
    answer_kind: choice (the answer is one of `choices`), or of free text exact (the same text),
        number (the same number), f1 (the reward is F1 of the words), contains (the answer is in it)
        or regex (the line's answer is a regular expression, which is found in it).
    scorer: answer (the line's, by `answer_kind`), function (`function`, MODULE.FUNCTION, which is
        called as score(prompts, answers, items) and returns a reward from 0 to 1 for each answer),
        judge (a model behind an endpoint, `judge`) or preference_model (a reward or preference
        model, `preference_model`). Of the last three, lines need no answer, and may have more
        fields.
    function_source: digest of the function's file, which is found when a run is composed.
    stop: texts that end a written answer in a plain prompt, where a model goes on with the next
        question by itself. With a chat template the model's own end of turn ends it.
    """

    path: str
    template: str
    answer_kind: str
    stop: list[str]
    scorer: str
    function: str | None
    function_source: str | None
    judge: JudgeConfig
    preference_model: PreferenceModel

    def faults(self) -> list[str]:
        found = super().faults()
        if self.answer_kind not in KINDS:
            near = did_you_mean(self.answer_kind, KINDS)
            found.append(
                f"task.answer_kind={self.answer_kind}: must be one of {', '.join(KINDS)}{near}"
            )
        elif self.answer_kind != "choice" and self.choices is not None:
            found.append(
                f"task.answer_kind={self.answer_kind}: is of answers written freely, and "
                f"task.choices={list(self.choices)} restricts them; set task.choices=null and "
                "task.max_new_tokens=32, or as many as an answer needs"
            )
        found += self._scorer_faults()
        if "" in self.stop:
            found.append(f"task.stop={list(self.stop)}: an empty text would end every answer")
        if self.choices and self.stop:
            found.append(f"task.stop={list(self.stop)}: does nothing where task.choices are given")
        return found

    def _scorer_faults(self) -> list[str]:
        found = []
        if self.scorer not in SCORERS:
            near = did_you_mean(self.scorer, SCORERS)
            found.append(f"task.scorer={self.scorer}: must be one of {', '.join(SCORERS)}{near}")
        if self.scorer == "function":
            why = name_fault(self.function or "")
            found += [f"task.function={self.function}: {why}"] if why else []
        elif self.function is not None:
            found.append(f"task.function={self.function}: isn't used without task.scorer=function")
        if self.scorer == "judge":
            found += self.judge.faults()
            if self.shuffle_labels and "{reference}" not in self.judge.template:
                found.append(
                    "task.shuffle_labels=true: does nothing to what this judge is asked; put "
                    "{reference} into task.judge.template, or leave the control out"
                )
        if self.scorer == "preference_model":
            found += self.preference_model.faults()
            if self.shuffle_labels:
                found.append(
                    "task.shuffle_labels=true: does nothing to what a preference model reads; "
                    "leave the control out"
                )
        if self.scorer != "answer" and self.answer_kind != "choice":
            found.append(
                f"task.answer_kind={self.answer_kind}: does nothing with task.scorer={self.scorer}"
            )
        return found

    @property
    def scorer_name(self) -> str:
        return self.scorer_used.name

    @property
    def scorer_used(self) -> Scorer:
        """Raises `UserError` where there are no choices to choose from."""
        if self.scorer == "function":
            return FunctionScorer(str(self.function), str(self.function_source))
        if self.scorer == "judge":
            return self.asked_judge
        if self.scorer == "preference_model":
            return self.preference
        if self.answer_kind in WRITTEN:
            return WRITTEN[self.answer_kind].scorer
        if not self.choices:
            raise UserError(
                "task.choices is empty; give the answers, e.g. task.choices=[yes,no], or say how "
                f"written ones are compared: task.answer_kind={'|'.join(WRITTEN)}"
            )
        return ChoiceScorer(tuple(self.choices))

    @cached_property
    def asked_judge(self) -> Judge:
        """The judge, which counts its calls."""
        return Judge(self.judge)

    @cached_property
    def preference(self) -> PreferenceScorer:
        """The reward model, which counts what it reads."""
        return PreferenceScorer(self.preference_model)

    def load_scorer(self) -> None:
        if self.scorer == "judge":
            self.asked_judge.load()
        if self.scorer == "preference_model":
            self.preference.load()

    def told(self) -> dict[str, Any]:
        if self.scorer == "preference_model":
            return {"preference_model": self.preference.told()}
        return {"judge": dict(self.asked_judge.calls.counts)} if self.scorer == "judge" else {}

    @property
    def against_unsteered(self) -> bool:
        return self.scorer == "preference_model" and self.preference_model.map == "rank"

    def take_unsteered(self, items: Sequence[Item], outputs: Sequence[str]) -> None:
        self.preference.take_unsteered(items, outputs)

    @property
    def stop_strings(self) -> list[str]:
        return [] if self.chat_template or self.choices else self.stop

    @classmethod
    def settled(cls, section: Mapping[str, Any]) -> dict[str, Any]:
        """What of a resolved section is to be found in files, by key: sizes that are shares, or
        left out, in items, and the digests of a function's source and of a preference model.

        Raises `UserError` as `draw` does.
        """
        found: dict[str, Any] = {}
        if section.get("function") and not section.get("function_source"):
            key = f"task.function={section['function']}"
            if why := name_fault(str(section["function"])):
                raise UserError(f"{key}: {why}")
            module = str(section["function"]).rpartition(".")[0]
            found["function_source"] = source_digest(module, key)
        model = section.get("preference_model") or {}
        if section.get("scorer") == "preference_model" and model.get("path"):
            digest = model.get("digest") or digest_of(str(model["path"]))
            found["preference_model"] = {**model, "digest": digest}
        section = {**section, **found}
        if not shares.is_open(section):
            return found
        plain = OmegaConf.create({**section, **dict.fromkeys(shares.LEFT_OUT, 1)})
        made = fill(plain, "task", cls)
        where = f"task.path={made.path}"
        key = content_key([cls.__qualname__, asdict(made), _state(home(made.path, "task.path"))])
        if key not in _COUNTED:
            _COUNTED[key] = len(of_groups(unique(list(made.items())), made.groups, where))
        return {**found, **shares.numbers(section, _COUNTED[key], where)}

    def draw(self) -> Splits:
        """Raises `UserError` where the file is missing, or a line is not as it should be."""
        items = unique(list(self.items()))
        if self.scorer == "function" and items:  # tried before anything heavy is loaded
            self.score(items[:1], [items[0].target or ""])
        return self.cut(items, f"task.path={self.path}")

    def items(self) -> Iterator[Item]:
        """All items of the file. Raises `UserError` as `draw` does."""
        if self.scorer == "answer":
            _ = self.scorer_used
        path = home(self.path, "task.path")
        if path.exists() and not path.is_file():  # a device may go on for ever
            raise UserError(f"task.path={self.path}: is no file")
        answered: dict[str, tuple[str | None, str, int]] = {}  # by question: that, and its line
        # Not splitlines(): JSON strings may hold line separators that aren't line ends.
        lines = users_text(path, f"task.path={self.path}").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            row = json_line(line, where)
            question, answer = self._row(row, where)
            user = self.template.replace("{question}", question)
            group = row.get("group") or ""
            if not isinstance(group, str):
                raise UserError(f"{where}: the group {group!r} is not a text")
            more = group if self.scorer == "answer" else _without_answer(row)
            before, other, first = answered.setdefault(user, (answer, more, number))
            if before == answer and other != more:
                raise UserError(
                    f"{path}: the same question has other fields in line {first} than in line "
                    f"{number} ({question[:60]!r}); keep one of them"
                )
            if before != answer:
                raise UserError(
                    f"{path}: the same question has the answer {before!r} in line {first} and "
                    f"{answer!r} in line {number} ({question[:60]!r}); keep one of them"
                )
            kept = "" if self.scorer == "answer" else more
            item = Item(content_id(user), user, answer, group=group, row=kept)
            if self.scorer == "judge" and (lacking := self.asked_judge.missing(item)):
                raise UserError(
                    f"{where}: has no {', '.join(lacking)}, which task.judge.template asks for"
                )
            yield item

    def _row(self, row: Any, where: str) -> tuple[str, str | None]:
        """Question and answer. Raises `UserError` where one isn't there, or isn't a text."""
        needed = ["question", "answer"] if self.scorer == "answer" else ["question"]
        if not isinstance(row, dict) or not set(needed) <= row.keys():
            expected = ", ".join(f'"{name}": …' for name in needed)
            raise UserError(f"{where}: expected {{{expected}}}, found {_brief(row)}")
        question, answer = row["question"], row.get("answer")
        given = {"question": question, "answer": answer}
        if answer is None and "answer" not in needed:
            del given["answer"]
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise UserError(f"{where}: the {name} is {_brief(value)}, not a text")
            if not str(value).strip():
                raise UserError(f"{where}: the {name} is empty")
        if answer is None:
            return str(question), None
        if self.scorer == "answer" and (fault := self._answer_fault(str(answer))):
            raise UserError(f"{where}: the answer {str(answer)!r} {fault}")
        return str(question), str(answer)

    def _answer_fault(self, answer: str) -> str:
        """What a line's answer lacks for the kind of answers; "" for nothing."""
        if self.answer_kind == "choice":
            known = answer in (self.choices or [])
            return "" if known else f"is not one of task.choices={self.choices}"
        fault = WRITTEN[self.answer_kind].fault(answer)
        return fault and f"{fault}, as task.answer_kind={self.answer_kind} needs it"

    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        return self.scorer_used(items, outputs)


def _state(path: Path) -> list[int]:
    """What changes when a file is written; [] where there is none."""
    try:
        stat = path.stat()
    except OSError:  # told where it is read
        return []
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def _without_answer(row: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in row.items() if k != "answer"}, sort_keys=True)


def _brief(value: Any) -> str:
    """As JSON writes it, cut."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
