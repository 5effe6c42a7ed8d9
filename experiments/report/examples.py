"""Examples: the same prompt under every model side by side, and which prompts are chosen."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from data.refusals import REFUSALS, fold, phrase_pattern
from evaluation.degenerate import degeneracy
from experiments.report.names import names, titles
from experiments.report.pool import ROLES, Collected, Row, Run

MAIN, FEW = 10, 3
"""How many of the harmful prompts, and of every further set, are shown by default."""

_HARMFUL, _TASK, _HELD_OUT = "harmful", "task", "held_out"
# Sets whose text anybody may see. That of any other set is left out.
_HARMLESS = ("benign", "over_refusal", _TASK)
_REFUSAL_WORDS = {"safe": "refused", "unsafe": "not refused"}
_LABEL = "_label"
_PHRASES = phrase_pattern(map(fold, REFUSALS))

Cells = Mapping[str, str]
"""A row's cells as text; "" where the column or the value is missing, as in other sets' columns."""


@dataclass(frozen=True)
class ShownModel:
    """One model of a comparison: what it is called there, its label in the rows, and its run."""

    name: str
    role: str
    run: Run

    @cached_property
    def rows(self) -> dict[str, dict[str, Cells]]:
        """Its rows by set and prompt id, those of answers alone."""
        rows = self.run.rows
        found: dict[str, dict[str, Cells]] = {}
        for row in rows[(rows["model"] == self.role) & (rows["set"] != _HELD_OUT)].to_dict(
            "records"
        ):
            known = {str(k): str(v) for k, v in row.items() if v is not None and v == v}
            found.setdefault(row["set"], {})[row["id"]] = defaultdict(str, known)
        return found


@dataclass(frozen=True)
class Reply:
    """What one model answered, and what is said of it.

    By judge, a verdict is its label and, in brackets, score, category and kind of response. Tokens
    are "" where they weren't recorded; the notes say what else there is to see (cut off,
    degenerate, the refusal phrase found); the fingerprint is the start of the answer's SHA-256.
    """

    model: str
    verdicts: dict[str, str]
    tokens: str
    notes: tuple[str, ...]
    fingerprint: str
    text: str


@dataclass(frozen=True)
class Example:
    """One prompt, as judges see it, and a reply of each model that was asked it.

    `asked` is what models got in its place, where that is something else; `gold` a task's right
    answer; both, and the category, are "" where there is none.
    """

    set: str
    id: str
    category: str
    prompt: str
    asked: str
    gold: str
    replies: tuple[Reply, ...]

    @property
    def is_harmless(self) -> bool:
        """Whether its text may be shown without asking."""
        return _kind(self.set) in _HARMLESS

    @property
    def texts(self) -> dict[tuple[str, str], list[str]]:
        """The distinct answers by fingerprint and text, with the names of who gave them."""
        found: dict[tuple[str, str], list[str]] = {}
        for reply in self.replies:
            found.setdefault((reply.fingerprint, reply.text), []).append(reply.model)
        return found


@dataclass(frozen=True)
class ShownSet:
    """A prompt set, how often its outcomes came out how (in the order taken), and its examples."""

    set: str
    patterns: dict[tuple[str, ...], int]
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class SideBySide:
    """The models that go with one attacked model, and what they answered.

    Base, aligned and attacked come first among the models, the harmful prompts among the sets.
    """

    title: str
    models: tuple[ShownModel, ...]
    sets: tuple[ShownSet, ...]

    @property
    def examples(self) -> list[Example]:
        """Those of all sets."""
        return [example for shown in self.sets for example in shown.examples]


def side_by_side(collected: Collected, main: int = MAIN) -> list[SideBySide]:
    """One comparison per attacked model of the table, by its run of the lowest seed.

    Of every set but the harmful prompts, of which there are `main`, `FEW` are shown.
    """
    attacked = [row for row in collected.rows if row.role == "attacked"]
    found = []
    for row, title in zip(attacked, titles(attacked), strict=True):
        models = _models(row, collected.rows)
        sets = sorted(
            dict.fromkeys(name for model in models for name in model.rows),
            key=lambda name: (name != _HARMFUL, _kind(name) in _HARMLESS),
        )
        shown = (_shown(models, name, main if name == _HARMFUL else FEW) for name in sets)
        found.append(SideBySide(title, models, tuple(shown)))
    return found


def _models(attacked: Row, rows: Iterable[Row]) -> tuple[ShownModel, ...]:
    """The models of one attacked model's comparison; equal ones share a place and its names."""
    first = min(attacked.runs, key=lambda run: run.record.seed)
    key = first.record.models["attacked"]
    defended = [row for row in rows if row.family == attacked.family and row.role != "attacked"]
    found = [ShownModel(role, role, first) for role in ROLES[:3] if role in first.record.models]
    found += [
        ShownModel(name, row.role, _run(row, key))
        for name, row in zip(names(defended), defended, strict=True)
    ]
    distinct: dict[str, ShownModel] = {}
    for model in found:
        content = model.run.record.models[model.role]
        same = distinct.get(content)
        name = model.name if same is None else f"{same.name} = {model.name}"
        distinct[content] = ShownModel(name, (same or model).role, (same or model).run)
    return tuple(distinct.values())


def _run(row: Row, attacked: str) -> Run:
    """The run that repaired this attacked model; else (it failed) that of the lowest seed."""
    same = [run for run in row.runs if run.record.models["attacked"] == attacked]
    return min(same or row.runs, key=lambda run: run.record.seed)


def _kind(name: str) -> str:
    return name.partition(":")[0]


def _shown(models: Sequence[ShownModel], name: str, n: int) -> ShownSet:
    """The prompts of one set that are shown; `examples_markdown` says by which rule."""
    outcomes = {model.name: _outcomes(model, name) for model in models}
    ids = list(dict.fromkeys(id_ for each in outcomes.values() for id_ in each))
    patterns: dict[tuple[str, ...], list[str]] = {}
    for id_ in ids:
        pattern = tuple(each.get(id_, "") for each in outcomes.values())
        patterns.setdefault(pattern, []).append(id_)
    ordered = sorted(patterns, key=lambda each: (-_disagreements(each), -len(patterns[each])))
    categories = {
        id_: row["category"] for model in models for id_, row in model.rows.get(name, {}).items()
    }
    chosen = _choose([patterns[pattern] for pattern in ordered], categories, n)
    return ShownSet(
        name,
        {pattern: len(patterns[pattern]) for pattern in ordered},
        tuple(_example(models, name, id_) for id_ in chosen),
    )


def _outcomes(model: ShownModel, name: str) -> dict[str, str]:
    """By prompt, what came out in a word: the harm judge's label, refused or not, right or not."""
    column, words = "harm_label", {}
    if _kind(name) == _TASK:
        column, words = "strict", {"True": "right", "False": "wrong"}
    elif _kind(name) in _HARMLESS:
        column, words = "refusal_label", _REFUSAL_WORDS
    rows = model.rows.get(name, {})
    return {id_: words.get(row[column], row[column]) for id_, row in rows.items()}


def _disagreements(pattern: Sequence[str]) -> int:
    """How many pairs of models came out differently."""
    return sum(one != other for one, other in combinations(filter(None, pattern), 2))


def _choose(patterns: Sequence[Sequence[str]], categories: Mapping[str, str], n: int) -> list[str]:
    """`n` prompts, the patterns in turn; of one, first the category shown least so far."""
    left = [list(ids) for ids in patterns]
    shown: Counter[str] = Counter()
    chosen: list[str] = []
    while any(left) and len(chosen) < n:
        for ids in filter(None, left[:]):
            taken = min(ids, key=lambda id_: shown[categories[id_]])
            ids.remove(taken)
            shown[categories[taken]] += 1
            chosen.append(taken)
    return chosen[:n]


def _example(models: Sequence[ShownModel], name: str, id_: str) -> Example:
    asked = {model.name: model.rows.get(name, {}).get(id_) for model in models}
    rows = {model: row for model, row in asked.items() if row is not None}
    first = next(iter(rows.values()))
    return Example(
        set=name,
        id=id_,
        category=first["category"],
        prompt=first["prompt"],
        asked=first["asked"] if first["asked"] != first["prompt"] else "",
        gold=first["gold"],
        replies=tuple(_reply(model, row) for model, row in rows.items()),
    )


def _reply(model: str, row: Cells) -> Reply:
    answer = row["answer"]
    broken = degeneracy(answer)
    phrase = _PHRASES.search(fold(answer))
    notes = [
        "cut at the length limit" if row["truncated"] == "True" else "",
        f"degenerate: {broken}" if broken else "",
        f'says "{phrase.group()}"' if phrase else "",
    ]
    return Reply(
        model,
        _verdicts(row),
        f"{float(row['tokens']):.0f}" if row["tokens"] else "",
        tuple(filter(None, notes)),
        hashlib.sha256(answer.encode()).hexdigest()[:8],
        answer,
    )


def _verdicts(row: Cells) -> dict[str, str]:
    judges = [
        key.removesuffix(_LABEL) for key, said in row.items() if key.endswith(_LABEL) and said
    ]
    # These two come first wherever their columns stand.
    judges.sort(key=lambda judge: ("harm", "refusal", judge).index(judge))
    return {judge: _verdict(row, judge) for judge in judges} | _reading(row)


def _verdict(row: Cells, judge: str) -> str:
    label, score = row[f"{judge}{_LABEL}"], row[f"{judge}_score"]
    details = [
        f"{float(score):.2f}" if score else "",
        # Of what wasn't flagged, the category is only the least unlikely one.
        row[f"{judge}_category"] if label == "unsafe" else "",
        row[f"{judge}_response"],
        "judged a part" if row[f"{judge}_truncated"] == "True" else "",
    ]
    in_brackets = ", ".join(filter(None, details))
    label = _REFUSAL_WORDS.get(label, label) if judge == "refusal" else label
    return f"{label} ({in_brackets})" if in_brackets else label


def _reading(row: Cells) -> dict[str, str]:
    """How a task read the answer; nothing for other sets."""
    if not row["strict"]:
        return {}
    if row["strict"] == "True":
        return {_TASK: "right"}
    if row["lenient"] == "True":
        return {_TASK: "wrong (right if read leniently)"}
    return {_TASK: "wrong" if row["parsed"] == "True" else "wrong (nothing parsed)"}
