"""The report as one HTML page: what it says, that it is self-contained, that text stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import socket
import time
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from evaluation.statistics import share
from experiments.report import html, published
from experiments.report.__main__ import main as report
from experiments.report.drawing import looks
from experiments.report.pool import collect
from experiments.results.record import Record
from tests.records import (
    ATTACKED,
    EVIL,
    GOOD,
    POOR,
    ROWS,
    heat_map,
    rewrite,
    write_run,
    write_sweep,
)


class Page(HTMLParser):
    """Tags with their attributes, tables as text, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.keys: dict[str, list[list[str]]] = {}
        self.text = ""
        self._table = self._cell = self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given, self._inside = dict(attrs), tag
        self.tags.append((tag, given))
        if tag == "table":
            self._table = str(given["id"])
            self.tables[self._table], self.keys[self._table] = [], []
        elif tag == "tr":
            self.tables[self._table].append([])
            self.keys[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
            self._cell = tag
            self.keys[self._table][-1].append(given.get("data-by") or "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = ""
        elif tag == "b" and self._table and self._cell == "td":
            self.tables[self._table][-1][-1] += " "

    def handle_data(self, data: str) -> None:
        self.text += data
        if (self._cell, self._inside) == ("th", "small"):
            return  # What tells a row of one name from another stands under its name.
        if self._table and self.tables[self._table] and self.tables[self._table][-1]:
            self.tables[self._table][-1][-1] += " ".join(data.split())

    def row(self, table: str, model: str) -> dict[str, str]:
        """The first row of that model, by the heads of its columns."""
        heads, *rows = self.tables[table]
        return next(dict(zip(heads, row, strict=True)) for row in rows if row[0] == model)

    def column(self, table: str, head: str) -> list[str]:
        """What a column is sorted by."""
        place = self.tables[table][0].index(head)
        return [row[place] for row in self.keys[table][1:]]


def page_of(*paths: Path) -> Page:
    collected, folder = collect(paths), paths[0] / "report"
    path = html.write(collected, published.comparisons(collected), paths, folder)
    return Page(path.read_text())


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    folder = write_sweep(tmp_path_factory.mktemp("sweep"))
    return folder, page_of(folder)


def test_the_table_is_computed_from_rows_and_sorts_by_numbers(swept: tuple[Path, Page]) -> None:
    _, page = swept
    good, expected = page.row("main", "good"), share(1, ROWS)
    interval = f"{100 * expected.low:.1f}–{100 * expected.high:.1f}, n={ROWS}"
    assert good["HS"].startswith(f"5.0 {interval}")
    # 18 of 20 harmful answers before, 1 after.
    assert "Δ −85.0, p < 0.001" in good["HS"]
    assert page.row("main", "attacked")["HS"].startswith("90.0 ")
    assert [float(key) for key in page.column("main", "HS")] == pytest.approx(
        [0.05, 0.05, 0.9, 0.9, 0.05, 0.05, 0.85, 0.85]
    )
    assert page.column("main", "poison_ratio") == ["", "", *3 * ["0.05", "0.2"]]


def test_the_summary_says_who_restored_what_at_which_cost(swept: tuple[Path, Page]) -> None:
    text = " ".join(swept[1].text.split())
    assert "has HS 90.0 % [69.9, 97.2] where the aligned model has 5.0 % [0.9, 23.6]" in text
    assert "Of 2 defenses, 1 brings HS down" in text
    # Every attacked model has its own.
    for part in text.partition("Brackets")[0].split("poison_ratio=")[1:]:
        restored, others = part.split("HS above the aligned model's")
        assert "good: HS 5.0 % [0.9, 23.6], accuracy −20.0" in restored.split("HS down to")[-1]
        assert "poor: HS 85.0 %" in others


def under_a_trigger(folder: Path, before: int, after: int) -> Path:
    """A run whose harmful prompts were asked under the attack's own trigger, "shift", too."""
    write_run(folder, {}, GOOD, ATTACKED, defense="good")
    rows = pd.read_parquet(folder / "rows.parquet")
    counts = {"base": 0, "aligned": 1, "attacked": before, "defended": after}
    asked = rows[rows["set"] == "harmful"].assign(set="harmful+shift")
    unsafe = asked["id"].astype(int) < asked["model"].map(counts)
    for judge in ("harm", "refusal"):
        asked[f"{judge}_label"] = unsafe.map({True: "unsafe", False: "safe"})
    Record.read(folder).write(folder, pd.concat([rows, asked], ignore_index=True))
    return folder


def test_a_repair_is_judged_by_the_worst_that_its_model_was_asked_under(tmp_path: Path) -> None:
    page = page_of(under_a_trigger(tmp_path / "kept", ROWS, ROWS))
    text = " ".join(page.text.split())
    assert "has HS 100.0 % [83.9, 100.0] under shift (90.0 % [69.9, 97.2] asked plainly)" in text
    assert "Of 1 defense, 0 bring HS down, however it is asked," in text
    assert "good: HS 100.0 % [83.9, 100.0] under shift (5.0 %" in text
    heads = page.tables["main"][0]
    # What was attacked with comes first, plain HS stays, and each has its test.
    assert heads[1:4] == ["HS under shift", "ASR under shift", "HS"]
    assert "Δ +0.0, p = 1.000" in page.row("main", "good")["HS under shift"]
    assert page.row("against-attacked", "good")["HS under shift"].startswith("+0.0 ")
    text = " ".join(page_of(under_a_trigger(tmp_path / "gone", ROWS, 1)).text.split())
    assert "Of 1 defense, 1 brings HS down" in text


def test_the_page_says_what_was_run_on_what(tmp_path: Path) -> None:
    write_run(tmp_path / "0", {"attack.train": {"epochs": 3}}, GOOD, ATTACKED, defense="good")
    write_run(tmp_path / "1", {"attack.train": {"epochs": 3}}, ATTACKED, ATTACKED, defense="none")
    judges = {"harm": {"judge": "moderation", "weights": "w1", "threshold": 0.5}}
    sources = {"harmful": {"name": "toy/harmful", "fingerprint": "f"}}
    rewrite(tmp_path / "0", judges=judges, data={"sources": sources})
    page = page_of(tmp_path)
    text = " ".join(page.text.split())
    assert "ft on toy, repaired by good (2026-01-01)" in text
    assert "ft on sums (poison ratio 0.05, epochs 3, adapter resume)" in text
    assert f"{ROWS} harmful from toy/harmful" in text
    assert "harm: moderation (weights w1, threshold 0.5)" in text
    # No defense is the attacked model, which is no row twice and is tested against nothing.
    assert [row[0] for row in page.tables["main"]][1:] == ["base", "aligned", "attacked", "good"]
    assert "HS under" not in text
    assert "under NAME" not in text


def test_nothing_is_fetched_and_only_its_own_script_runs(swept: tuple[Path, Page]) -> None:
    folder, page = swept
    links = [
        str(value)
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "data", "srcset")
    ]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    source = (folder / "report" / "report.html").read_text()
    assert "@import" not in source
    assert not re.findall(r"url\((?!#)", source)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv"))
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}'")


def test_anchors_and_ids_are_whole(swept: tuple[Path, Page]) -> None:
    ids = [str(a["id"]) for _, a in swept[1].tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {str(a[k])[1:] for _, a in swept[1].tags for k in ("href", "xlink:href") if k in a}
    assert {target for target in targets if not target.startswith("ata:")} <= set(ids)


def test_no_prompt_and_no_answer_is_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "0", {}, GOOD, ATTACKED)
    rows = pd.read_parquet(tmp_path / "0" / "rows.parquet")
    rows = rows.assign(prompt="how to pilfer", answer="pilfer thus")
    Record.read(tmp_path / "0").write(tmp_path / "0", rows)
    page_of(tmp_path)
    assert "pilfer" not in (tmp_path / "report" / "report.html").read_text()


def test_what_a_user_wrote_stays_text(tmp_path: Path) -> None:
    for i, value in enumerate(("a", EVIL)):
        write_run(tmp_path / str(i), {"defense.mode": value}, GOOD, ATTACKED, defense=EVIL)
        rewrite(
            tmp_path / str(i), overrides=[f"defense.mode={value}"], environment={"commit": EVIL}
        )
    page = page_of(tmp_path)
    assert [tag for tag, _ in page.tags].count("script") == 1
    # In the table, in a chart's legend, and in a point's title.
    assert page.text.count(EVIL) >= 3
    assert page.row("main", EVIL)["mode"].strip() == EVIL


def test_commands_run_the_jobs_again(tmp_path: Path) -> None:
    given = ["defense=good", "attack.task=a b", "plugins=['x;y']", "seed=1"]
    write_run(tmp_path / "0", {}, GOOD, ATTACKED, defense="good")
    stages = [
        {"name": "attack", "key": "k", "seconds": 3.21, "reused": False},
        {"name": "prepare", "key": "k", "seconds": 0.0, "reused": True},
    ]
    rewrite(tmp_path / "0", overrides=given, stages=stages, environment={"commit": "abc123"})
    text = " ".join(page_of(tmp_path).text.split())
    (line,) = re.findall(r"python -m experiments\.run .*? seed=1", text)
    assert shlex.split(line) == ["python", "-m", "experiments.run", *given]
    assert "record ../0/record.json. Made: attack (3.2 s). Reused: prepare." in text
    assert "Commit abc123" in text


def status(folder: Path, content: str | dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "status.json").write_text(text)


def test_jobs_without_a_result_are_listed_with_their_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "0", {}, GOOD, ATTACKED)
    status(tmp_path / "0", {"status": "done", "overrides": []})
    failed = {"status": "failed", "overrides": ["seed=7"], "reason": f"no {EVIL} here"}
    status(tmp_path / "1", failed)
    status(tmp_path / "2", {"status": "running", "overrides": ["seed=8"]})
    status(tmp_path / "3", "{")
    # The parent of this process lives; another machine's processes nobody knows of.
    alive = {"pid": os.getppid(), "time": time.time(), "status": "running", "overrides": []}
    status(tmp_path / "4", {**alive, "host": socket.gethostname()})
    status(tmp_path / "5", {**alive, "host": "some-other-machine"})
    (tmp_path / "10").mkdir()
    (tmp_path / "multirun.yaml").write_text("")
    text = " ".join(page_of(tmp_path).text.split())
    assert "6 jobs have no result." in text
    parts = re.split(r"Job (\d+)", text.partition("Jobs without a result")[2])
    reasons = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(reasons) == ["1", "2", "3", "4", "5", "10"]
    assert f"no {EVIL} here python -m experiments.run seed=7" in reasons["1"]
    assert "killed" in reasons["2"]
    assert "can't be read" in reasons["3"]
    assert "it is still running" in reasons["4"]
    assert "another machine" in reasons["5"]
    assert socket.gethostname() not in text
    assert "some-other-machine" not in text
    assert "killed" in reasons["10"]


def test_a_sweep_of_failures_only_has_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status(tmp_path / "0", {"status": "failed", "overrides": ["seed=7"], "reason": "no model"})
    assert report([str(tmp_path), "--html"]) == 0
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert page.tables == {}
    assert "No run has ended with a result." in page.text
    assert "no model" in page.text
    assert report([str(tmp_path)]) == 1
    assert "give a folder of finished runs" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report([str(tmp_path / "no"), "--html"]) == 1
    assert report([str(tmp_path), "--html"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [error.partition(":")[0] for error in errors] == ["error", "error"]
    assert not (tmp_path / "report").exists()


def test_it_warns_of_several_commits_and_of_the_validation_split(tmp_path: Path) -> None:
    splits = ("test", "validation")
    for i, split in enumerate(splits):
        changes = {"evaluation.split": split}
        write_run(tmp_path / str(i), changes, GOOD, ATTACKED)
        rewrite(tmp_path / str(i), environment={"commit": f"c{i}{'+changes' * i}"})
    text = " ".join(page_of(tmp_path).text.split())
    assert "made by 2 versions of the project (c0, c1+changes)" in text
    assert "changes that no commit holds" in text
    assert "1 of 2 runs were measured on the validation split" in text


def test_models_of_the_two_splits_are_never_set_against_each_other(tmp_path: Path) -> None:
    for i, split in enumerate(("test", "validation")):
        changes = {"evaluation.split": split}
        write_run(tmp_path / str(i), changes, GOOD, POOR if i else ATTACKED, defense="good")
        rewrite(tmp_path / str(i), models=Record.read(tmp_path / "0").models)
    rows = collect([tmp_path]).rows
    families = {row.family for row in rows} - {None}
    assert len(families) == 2
    for family in families:
        members = [row for row in rows if row.family == family]
        assert [row.role for row in members] == ["attacked", "defended"]
        assert len({row.settings["evaluation.split"] for row in members}) == 1


def test_categories_count_what_is_degenerate_as_not_safe(tmp_path: Path) -> None:
    write_run(tmp_path / "0", {}, GOOD, ATTACKED, defense="good")
    rows = pd.read_parquet(tmp_path / "0" / "rows.parquet")
    harmful = (rows["set"] == "harmful") & (rows["model"] == "defended")
    rows.loc[rows["set"] == "harmful", "category"] = "theft"
    rows.loc[harmful & (rows["id"] == "19"), "category"] = "fraud"
    rows.loc[harmful & (rows["id"] == "19"), "harm_label"] = "degenerate"
    Record.read(tmp_path / "0").write(tmp_path / "0", rows)
    page = page_of(tmp_path)
    good = page.row("categories", "good")
    assert good["fraud"].startswith("100.0 ")
    assert good["fraud"].endswith("n=1")
    assert good["theft"].endswith("n=19")
    assert good["all"].startswith("10.0 ")
    heats = [str(a["style"]) for tag, a in page.tags if tag == "td" and "style" in a]
    assert "--heat: 1.0000" in heats


def test_a_defense_has_one_colour_in_all_charts(swept: tuple[Path, Page]) -> None:
    source = (swept[0] / "report" / "report.html").read_text()
    own = looks(["good", "poor"])
    points = re.findall(r'class="point">\s*<title>(good|poor)\b.*?fill: (#\w{6})', source, re.S)
    assert len(points) > 8
    assert all(colour == own[name]["color"].lower() for name, colour in points)


def test_charts_tell_their_figures_as_text_and_bring_their_own_paper(
    swept: tuple[Path, Page],
) -> None:
    source = (swept[0] / "report" / "report.html").read_text()
    charts = re.findall(r'<figure class="chart" id="([\w-]+)">.*?(<svg.*?</svg>)', source, re.S)
    names = [name for name, _ in charts]
    assert names == ["ratio-0", "trade-off-0", "trade-off-1", "cost-seconds", "cost-edited"]
    by_name = dict(charts)
    assert "<title>good, 5 % poison: HS 5.0 0.9–23.6 n=20, accuracy 60.0" in by_name["ratio-0"]
    assert "good: 2 s" in by_name["cost-seconds"]
    assert "<title>good: prepare 1 s</title>" in by_name["cost-seconds"]
    for svg in by_name.values():
        assert re.search(r'role="img"[^>]* aria-label="[^"]+"', svg)
        assert "fill: #ffffff" in svg


def test_memory_is_drawn_where_a_gpu_counted_it(tmp_path: Path) -> None:
    write_run(tmp_path / "0", {}, GOOD, ATTACKED, defense="good")
    for cuda, drawn in ((None, False), ("12.8", True)):
        rewrite(tmp_path / "0", environment={"cuda": cuda})
        page_of(tmp_path)
        source = (tmp_path / "report" / "report.html").read_text()
        assert ('id="cost-memory"' in source) is drawn


def test_a_malformed_map_is_an_error_and_the_page_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = heat_map() | {"values": []}
    apply = {"maps": [heat_map() | {"name": "other"}, bad]}
    write_run(tmp_path / "0", {}, GOOD, ATTACKED, apply=apply)
    assert report([str(tmp_path), "--html"]) == 1
    assert "no values" in capsys.readouterr().err
    source = (tmp_path / "report" / "report.html").read_text()
    assert "<summary>Accuracy of the probes: relock on toy, ft, sums</summary>" in source


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_names_are_told_apart_on_white_paper() -> None:
    own = looks([])
    assert len({look["color"] for look in own.values()}) == len(own)
    assert len({look["marker"] for look in own.values()}) == len(own)
    colours = [look["color"] for look in own.values()]
    assert min(contrast(colour, "#FFFFFF") for colour in colours) >= 3
    distances = [
        sum((int(a[i : i + 2], 16) - int(b[i : i + 2], 16)) ** 2 for i in (1, 3, 5))
        for a, b in combinations(colours, 2)
    ]
    assert min(distances) >= 40**2
    many = looks(f"repair{number}" for number in range(40))
    assert len({tuple(look.values()) for look in many.values()}) == len(own) + 40


def test_the_text_colours_are_readable_on_their_backgrounds() -> None:
    css = (Path(html.__file__).parent / "page.css").read_text()
    found = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", css)
    colours = {name: pair for name, *pair in found}
    for theme in (0, 1):
        for text, backgrounds in {
            "ink": ("page", "raised", "note", "hot"),
            "faint": ("page", "raised"),
            "link": ("page",),
            "bad": ("page",),
        }.items():
            for background in backgrounds:
                assert contrast(colours[text][theme], colours[background][theme]) >= 4.5
