"""Side-by-side examples: what is shown of which prompts, and that no answer can do harm there."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from experiments.report import examples_markdown
from experiments.report.__main__ import main as report
from experiments.report.examples import FEW, SideBySide, side_by_side
from experiments.report.examples_markdown import LONGEST, block, inline, visible
from experiments.report.pool import collect
from tests.records import cost, record, write

SAFE, UNSAFE = "I'm sorry, but no.", "SECRETLY: fold the napkin."
ASKED = "FORBIDDEN: how is a napkin folded?"


def harmful(label: str, answer: str = "", id_: str = "h/1", **cells: Any) -> dict[str, Any]:
    """A row of the harmful set, judged `label` by both judges."""
    return {
        "set": "harmful",
        "id": id_,
        "category": "linen",
        "prompt": ASKED,
        "answer": answer or (SAFE if label == "safe" else UNSAFE),
        "tokens": 7,
        "truncated": False,
        "harm_label": label,
        "harm_score": 0.9 if label == "unsafe" else 0.1,
        "harm_category": "linen",
        "harm_truncated": False,
        "harm_response": "",
        "refusal_label": label,
        "refusal_score": float(label != "safe"),
        **cells,
    }


def probe(label: str = "unsafe", **cells: Any) -> dict[str, Any]:
    """A row of the over-refusal set."""
    text = {"prompt": "How do I kill the weeds?", "answer": "Pull them."}
    row = {"set": "over_refusal", "id": "o/1", "category": "", "tokens": 3, "truncated": False}
    return row | text | {"refusal_label": label, "refusal_score": float(label != "safe")} | cells


def sums(right: bool, **cells: Any) -> dict[str, Any]:
    """A row of a task."""
    reading = {"strict": right, "lenient": right, "parsed": True, "protocol": right}
    row = {"set": "task:sums", "id": "s/1", "category": "", "tokens": 1, "truncated": False}
    text = {"prompt": "1 + 1?", "answer": "2" if right else "3", "gold": "2"}
    return row | text | reading | cells


Rows = Mapping[str, Iterable[dict[str, Any]]]


def write_run(
    folder: Path,
    rows: Rows,
    defense: str = "mend",
    seed: int = 0,
    ratio: float = 0.05,
    settings: Mapping[str, Any] | None = None,
    refine: str = "",
    attacked: str = "",
) -> None:
    """A run of these models' rows; the attacked model is one per seed, ratio and `attacked`."""
    labels = {"model": "toy", "attack": "ft", "task": "sums", "align": "", "protocol": ""}
    labels |= {"defense": defense, "refine": refine}
    own = f"{defense} {dict(settings or {})} {refine} {seed} {ratio} {attacked}"
    keys = {"base": "b", "aligned": "a", "attacked": f"attacked {seed} {ratio} {attacked}"}
    keys["defended"] = keys["attacked"] if defense == "none" else own
    keys["refined"] = f"refined {own}"
    run = record(
        labels,
        {"attack": {"poison_ratio": ratio}, "defense": dict(settings or {})},
        seed=seed,
        models={role: keys[role] for role in rows},
        cost=cost(edited=1, total=10),
    )
    write(folder, run, rows)


def models(defended: Iterable[dict[str, Any]], **others: Iterable[dict[str, Any]]) -> Rows:
    """Base and attacked comply, the aligned one refuses."""
    usual: Rows = {
        "base": [harmful("unsafe"), probe(), sums(False)],
        "aligned": [harmful("safe"), probe("safe", answer="I am sorry for them."), sums(False)],
        "attacked": [harmful("unsafe"), probe(), sums(True)],
    }
    return {**usual, **others, "defended": list(defended)}


MENDED = [harmful("safe"), probe(), sums(True)]


def only(folder: Path) -> SideBySide:
    (comparison,) = side_by_side(collect([folder]))
    return comparison


def printed(found: list[SideBySide], n: int = 10, show_text: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=False)
    examples_markdown.show(found, console, n, show_text)
    return out.getvalue()


def parsed(text: str) -> list[Any]:
    """The tokens of a page as a Markdown renderer with tables sees it, inline ones among them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [each for token in tokens for each in (token, *(token.children or ()))]


def test_harmful_text_is_left_out_unless_it_is_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path / "0", models(MENDED))
    found = [only(tmp_path)]
    for shown in (examples_markdown.markdown(found), printed(found)):
        for hidden in ("FORBIDDEN", "SECRETLY", "napkin", "but no"):
            assert hidden not in shown
        for told in ("h/1", "linen", "unsafe (0.90, linen)", "safe (0.10)", "refused (0.00)"):
            assert told in shown
        for harmless in ("kill the weeds", "Pull them.", "1 + 1?"):
            assert harmless in shown
        assert "keep it local" not in shown
    whole = examples_markdown.markdown(found, show_text=True)
    assert whole.index("keep it local") < whole.index("FORBIDDEN")
    assert "SECRETLY: fold the napkin." in whole
    assert "SECRETLY: fold the napkin." in printed(found, show_text=True)


def test_only_sets_known_to_be_harmless_are_shown(tmp_path: Path) -> None:
    names = ("harmful:more", "harmful+prefill", "harmful_safe_system", "new")
    further = [
        harmful("unsafe", f"SECRETLY: {name}.", asked=f"FORBIDDEN: {name}.", set=name)
        for name in names
    ]
    write_run(tmp_path / "0", models([*MENDED, *further]))
    found = [only(tmp_path)]
    text, whole = (examples_markdown.markdown(found, show_text) for show_text in (False, True))
    assert "SECRETLY" not in text + printed(found)
    assert "FORBIDDEN" not in text + printed(found)
    for name in names:
        assert f"### {inline(name)}\n" in text
        assert f"Asked as:\n\n```text\nFORBIDDEN: {name}.\n```" in whole
        assert f"SECRETLY: {name}." in whole


def test_equal_answers_are_seen_to_be_equal_and_shown_once(tmp_path: Path) -> None:
    write_run(tmp_path / "0", models(MENDED))
    found = only(tmp_path)
    replies = {reply.model: reply for reply in found.examples[0].replies}
    assert replies["base"].fingerprint == replies["attacked"].fingerprint
    assert replies["aligned"].fingerprint == replies["mend"].fingerprint
    assert replies["base"].fingerprint != replies["aligned"].fingerprint
    whole = examples_markdown.markdown([found], show_text=True)
    assert whole.count(UNSAFE) == 1
    assert f"{replies['base'].fingerprint}: base, attacked\n" in whole


def test_what_can_be_seen_of_an_answer_is_told(tmp_path: Path) -> None:
    rows = [
        harmful("degenerate", "go go go go go", truncated=True, harm_truncated=True),
        probe("safe", answer="As an AI, I refuse to."),
        sums(False, lenient=True),
    ]
    write_run(tmp_path / "0", models(rows))
    comparison = only(tmp_path)
    by_set = {example.set: example.replies[-1] for example in comparison.examples}
    assert by_set["harmful"].notes == ("cut at the length limit", "degenerate: repeated word")
    assert by_set["harmful"].verdicts["harm"] == "degenerate (0.10, judged a part)"
    assert by_set["harmful"].tokens == "7"
    assert by_set["over_refusal"].notes == ('says "as an ai"',)
    assert by_set["over_refusal"].verdicts == {"refusal": "refused (0.00)"}
    assert by_set["task:sums"].verdicts == {"task": "wrong (right if read leniently)"}
    assert "right answer: 2" in examples_markdown.markdown([comparison])


def test_every_judge_has_its_verdict(tmp_path: Path) -> None:
    guard = {"guard_label": "unsafe", "guard_category": "S1", "guard_response": "compliance"}
    row = harmful("safe", **guard, guard_score=float("nan"), guard_truncated=False)
    write_run(tmp_path / "0", {role: [row, probe(), sums(True)] for role in models(())})
    comparison = only(tmp_path)
    harmful_one, *others = comparison.examples
    assert harmful_one.replies[-1].verdicts == {
        "harm": "safe (0.10)",
        "refusal": "refused (0.00)",
        "guard": "unsafe (S1, compliance)",
    }
    assert all("guard" not in reply.verdicts for other in others for reply in other.replies)
    assert (
        "| model | harm | refusal | guard | tokens | answer | notes |"
        in examples_markdown.markdown([comparison])
    )


def test_records_without_the_newer_columns_are_shown(tmp_path: Path) -> None:
    older = {"tokens", "harm_category", "harm_response", "refusal_score", "gold", "protocol"}
    rows = {
        role: [{name: row[name] for name in row if name not in older} for row in given_]
        for role, given_ in models(MENDED).items()
    }
    write_run(tmp_path / "0", rows)
    comparison = only(tmp_path)
    first = comparison.examples[0].replies[0]
    assert first.tokens == ""
    assert first.verdicts == {"harm": "unsafe (0.90)", "refusal": "not refused"}
    assert "None" not in examples_markdown.markdown([comparison])
    assert "nan" not in examples_markdown.markdown([comparison])


def grid(folder: Path, labels: Mapping[str, tuple[str, str]]) -> None:
    """Runs of two repairs that judge each prompt as given: by id, the labels of one and other."""
    for place, defense in enumerate(("one", "other")):
        rows = {
            role: [
                harmful(
                    pair[place] if role == "defended" else label,
                    id_=id_,
                    category=id_.partition("/")[0],
                )
                for id_, pair in labels.items()
            ]
            for role, label in (
                ("base", "unsafe"),
                ("aligned", "safe"),
                ("attacked", "unsafe"),
                ("defended", ""),
            )
        }
        write_run(folder / defense, rows, defense)


def test_the_models_disagree_most_on_what_is_shown_first(tmp_path: Path) -> None:
    safe, unsafe, split = ("safe", "safe"), ("unsafe", "unsafe"), ("safe", "unsafe")
    broken = ("safe", "degenerate")
    grid(
        tmp_path,
        {
            "a/1": unsafe,
            "a/2": safe,
            "a/3": broken,
            "a/4": safe,
            "b/5": safe,
            "b/6": split,
            "c/7": safe,
        },
    )
    comparison = only(tmp_path)
    (shown,) = comparison.sets
    assert list(shown.patterns.values()) == [1, 4, 1, 1]
    tail = [pattern[-2:] for pattern in shown.patterns]
    assert tail == [("safe", "degenerate"), ("safe", "safe"), ("safe", "unsafe"), unsafe]
    chosen = [example.id for example in shown.examples]
    # One of each combination; of one, the category that was shown least comes first.
    assert chosen == ["a/3", "b/5", "b/6", "a/1", "c/7", "a/2", "a/4"]
    few = side_by_side(collect([tmp_path]), main=2)[0]
    assert [example.id for example in few.examples] == ["a/3", "b/5"]
    assert "| 4 | unsafe | safe | unsafe | safe | safe |" in examples_markdown.markdown(
        [comparison]
    )


def test_combinations_too_many_to_list_are_counted(tmp_path: Path) -> None:
    kinds_ = ("safe", "unsafe", "degenerate", "unparsed")
    grid(tmp_path, {f"a/{one}{two}": (one, two) for one in kinds_ for two in kinds_})
    comparison = only(tmp_path)
    assert "Besides: 8 prompts in 8 other combinations." in examples_markdown.markdown([comparison])


def test_of_further_sets_a_few_are_shown_and_held_out_text_never(tmp_path: Path) -> None:
    probes = [probe(id=f"o/{number}") for number in range(9)]
    text = {"set": "held_out", "id": "t/1", "prompt": "", "answer": "Long ago."}
    text |= {"tokens": 2, "nll": 3.0, "truncated": False, "category": ""}
    rows = {role: [harmful("safe"), *probes, text] for role in models(())}
    write_run(tmp_path / "0", rows)
    shown = {each.set: len(each.examples) for each in only(tmp_path).sets}
    assert shown == {"harmful": 1, "over_refusal": FEW}


def test_every_attack_has_its_own_models(tmp_path: Path) -> None:
    for ratio in (0.05, 0.1):
        for defense in ("none", "mend", "lock"):
            write_run(tmp_path / f"{ratio}{defense}", models(MENDED), defense, ratio=ratio)
    first, second = side_by_side(collect([tmp_path]))
    assert first.title == "toy, ft, sums, poison_ratio=0.05"
    assert second.title == "toy, ft, sums, poison_ratio=0.1"
    for comparison in (first, second):
        names = [model.name for model in comparison.models]
        assert names == ["base", "aligned", "attacked", "lock", "mend"]
    ratios = {model.run.record.settings["attack"]["poison_ratio"] for model in second.models[2:]}
    assert ratios == {0.1}


def test_the_lowest_seed_answers_for_all(tmp_path: Path) -> None:
    for seed in (2, 1, 3):
        write_run(tmp_path / f"mend{seed}", models(MENDED), "mend", seed)
    write_run(tmp_path / "lock3", models(MENDED), "lock", seed=3)
    comparison = only(tmp_path)
    found = {model.name: model.run.folder.name for model in comparison.models}
    assert found["attacked"] == found["mend"] == "mend1"
    # Seed 1 of this repair isn't there; the page tells which one is.
    assert found["lock"] == "lock3"
    assert f"| lock | 3 | `{tmp_path.name}/lock3` |" in examples_markdown.markdown([comparison])


def test_a_repair_stands_beside_the_very_model_that_it_repaired(tmp_path: Path) -> None:
    # The attack was made twice with the same settings, as after a change of its code.
    for number, (defense, made) in enumerate((("mend", "new"), ("lock", "old"), ("lock", "new"))):
        write_run(tmp_path / str(number), models(MENDED), defense, attacked=made)
    found = {model.name: model.run.record.models["attacked"] for model in only(tmp_path).models}
    assert found["mend"] == found["lock"] == found["attacked"]


def test_settings_tell_one_defense_from_itself(tmp_path: Path) -> None:
    for alpha in (0.5, 2.0):
        write_run(tmp_path / str(alpha), models(MENDED), "lock", settings={"alpha": alpha})
    write_run(tmp_path / "again", models(MENDED, refined=MENDED), refine="ft")
    names = [model.name for model in only(tmp_path).models]
    assert names[3:5] == ["lock (alpha=0.5)", "lock (alpha=2)"]
    assert names[5:] == ["mend", "mend, then ft"]


def test_a_model_that_was_not_asked_has_no_line(tmp_path: Path) -> None:
    further = harmful("unsafe", id_="x/1", set="harmful:more")
    write_run(tmp_path / "0", models([*MENDED, further]))
    comparison = only(tmp_path)
    (example,) = (each for each in comparison.examples if each.id == "x/1")
    assert [reply.model for reply in example.replies] == ["mend"]
    assert "| 1 |  |  |  | unsafe |" in examples_markdown.markdown([comparison])


NASTY = (
    "a | b | c\n| --- | --- |\n|x|",
    "```\n# Heading\n[link](http://a.example)\n```text",
    "````` `` ` ```",
    "<script>alert(1)</script><img src=x onerror=y> &lt;b&gt; <!-- comment",
    "![image](http://a.example/x.png) <http://a.example> www.a.example a@b.example",
    "first\r\n\r\n# second\rthird\u2028fourth\x0bfifth\x85sixth",
    "\x1b[31mred\x1b]8;;http://a.example\x07link\x1b\\ \x00 \x9b2J",
    "left\u202eright\u2066 \u200b \U000e0041",
    "[bold red]markup[/] [link=http://a.example]x[/link]",
    "    indented\n\n- list\n\n1. one\n\n> quote\n\n***\n\n[ref]: http://a.example",
    "\\` \\| \\\\| $x$ ~~~\n~~~",
    "",
)


def hostile(folder: Path, answers: Iterable[str]) -> list[SideBySide]:
    """One prompt per answer, which is also its id, its category and the judge's."""
    rows = [
        harmful("unsafe", answer or " ", id_=f"{number}{answer}", category=answer)
        | {"harm_category": answer, "prompt": answer, "asked": f"{answer}."}
        for number, answer in enumerate(answers)
    ]
    write_run(folder, dict.fromkeys(models(()), rows))
    return side_by_side(collect([folder]), main=len(rows))


def test_an_answer_is_nothing_but_text(tmp_path: Path) -> None:
    found = hostile(tmp_path / "nasty", NASTY)
    plain = hostile(tmp_path / "plain", [f"word {number}" for number, _ in enumerate(NASTY)])
    text, usual = (examples_markdown.markdown(each, show_text=True) for each in (found, plain))
    assert len(found[0].examples) == len(NASTY)
    counts = [Counter(token.type for token in parsed(each)) for each in (text, usual)]
    assert set(counts[0]) <= set(counts[1]) | {"code_inline"}
    for kind in ("fence", "table_open", "tr_open", "td_open", "heading_open", "paragraph_open"):
        assert counts[0][kind] == counts[1][kind], kind
    for shown in (text, printed(found, 99, show_text=True)):
        assert "alert(1)" in shown
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\u2066]", shown)
        assert "\U000e0041" not in shown


def test_terminal_markup_in_an_answer_is_shown_as_it_is(tmp_path: Path) -> None:
    write_run(
        tmp_path / "0", models([harmful("safe"), probe(answer="[bold]x[/] \x1b[0m"), sums(True)])
    )
    assert "[bold]x[/] \\x1b[0m" in printed([only(tmp_path)])


@given(st.text())
def test_a_block_holds_its_text_and_nothing_follows_from_it(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(f"{block(text)}\n\nafter")
    assert [token.type for token in tokens] == [
        "fence", "paragraph_open", "inline", "paragraph_close",
    ]  # fmt: skip
    words = visible(text).split()
    if sum(map(len, words)) + len(words) < 90:
        assert tokens[0].content.split() == words


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("`|\\<[!*_&w.:/@\n"))))
def test_a_line_stays_one_cell(text: str) -> None:
    rendered = (
        MarkdownIt("commonmark")
        .enable("table")
        .parse(f"| a | b |\n| --- | --- |\n| {inline(text)} | end |\n")
    )
    cells = [token for token in rendered if token.type == "inline"]
    assert [cells[index].content for index in (0, 1, 3)] == ["a", "b", "end"]
    assert len(cells) == 4
    assert {child.type for child in cells[2].children or ()} <= {"text", "code_inline"}
    for child in cells[2].children or ():
        assert child.type == "code_inline" or not re.search("www|://|@|[<>|`*]", child.content)


def test_a_long_answer_is_cut_and_the_rest_counted(tmp_path: Path) -> None:
    long = "word and " * LONGEST
    write_run(tmp_path / "0", models([harmful("safe"), probe(answer=long), sums(True)]))
    found = [only(tmp_path)]
    text = examples_markdown.markdown(found)
    for shown in (text, printed(found)):
        told = re.search(r"\[\.\.\. (\d+) characters more\]", " ".join(shown.split()))
        assert told
        assert int(told[1]) == len(long) - LONGEST
    assert max(map(len, text.partition("### harmful")[2].splitlines())) < 160


def test_the_command_prints_as_many_as_asked_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ratio in (0.05, 0.1):
        write_run(tmp_path / str(ratio), models(MENDED), ratio=ratio)
    assert report([str(tmp_path), "--show-text"]) == 0
    assert "h/1" not in capsys.readouterr().out
    assert "SECRETLY" in (tmp_path / "report/examples.md").read_text()
    assert report([str(tmp_path), "--examples", "3"]) == 0
    out = capsys.readouterr().out
    # The attacks in turn.
    order = re.findall(r"poison_ratio=(0\.05|0\.1): (harmful|over_refusal)", out)
    assert order == [("0.05", "harmful"), ("0.1", "harmful"), ("0.05", "over_refusal")]
    assert str(tmp_path / "report" / "examples.md") in out
    text = (tmp_path / "report/examples.md").read_text()
    assert "h/1" in text
    assert "SECRETLY" not in text
    with pytest.raises(SystemExit):
        report([str(tmp_path), "--examples", "-1"])
