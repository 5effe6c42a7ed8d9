"""The report's page in a real browser: what it shows, how it sorts, what it asks for."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.report import html
from experiments.report.pool import collect
from experiments.results.record import Record
from tests.experiments.report.test_html import EVIL, sweep
from tests.experiments.report.test_report_figures import ATTACKED, write_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"
    ),
]

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that it may hold, a name that would be a script among them."""
    folder = sweep(tmp_path_factory.mktemp("sweep"))
    write_run(folder / "4", {"attack.poison_ratio": 0.2}, ATTACKED, ATTACKED, defense=EVIL)
    for run in folder.iterdir():
        rows = pd.read_parquet(run / "rows.parquet")
        rows.loc[rows["set"] == "harmful", "category"] = "theft"
        Record.read(run).write(run, rows)
    failed = {"status": "failed", "overrides": [f"x={EVIL}"], "reason": EVIL}
    (folder / "5").mkdir()
    (folder / "5" / "status.json").write_text(json.dumps(failed))
    return html.write(collect([folder]), (), [folder], folder / "report")


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


def visit(chrome: Any, page: Path, width: int = 1280, scheme: str = "light") -> None:
    """Opens the page as a reader does who has never seen it, in a window of that width."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preferred = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", preferred)
    chrome.get(page.as_uri())
    chrome.execute_script("localStorage.clear()")
    chrome.get_log("performance")
    chrome.get_log("browser")
    chrome.get(page.as_uri())


def column(chrome: Any, place: int) -> list[str]:
    rows = "[...document.querySelectorAll('#main tbody tr')]"
    return chrome.execute_script(f"return {rows}.map(row => row.cells[{place}].dataset.by)")


def computed(chrome: Any, selector: str, name: str) -> str:
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    return chrome.execute_script(script, selector, name)


def screenshot(chrome: Any, page: Path, name: str) -> np.ndarray:
    import matplotlib.image

    shot = chrome.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    data = base64.b64decode(shot["data"])
    (page.parent / f"{name}.png").write_bytes(data)
    return matplotlib.image.imread(io.BytesIO(data))


def test_it_asks_for_nothing_and_says_nothing_on_the_console(chrome: Any, page: Path) -> None:
    visit(chrome, page)
    messages = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert page.as_uri() in asked
    assert all(url == page.as_uri() or url.startswith("data:") for url in asked)
    assert chrome.get_log("browser") == []


def test_a_script_in_a_name_is_text_and_an_added_one_does_not_run(chrome: Any, page: Path) -> None:
    visit(chrome, page)
    assert EVIL in chrome.execute_script("return document.querySelector('#failures').textContent")
    assert EVIL in chrome.execute_script("return document.querySelector('#main').textContent")
    chrome.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.ran = true';"
        "document.body.append(s)"
    )
    assert chrome.execute_script("return window.ran === undefined")
    assert "Content Security Policy" in chrome.get_log("browser")[0]["message"]


def test_a_column_sorts_both_ways_by_mouse_and_by_keyboard(chrome: Any, page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    visit(chrome, page)
    heads = chrome.find_elements(By.CSS_SELECTOR, "#main thead th")
    place = [head.text.split()[0] for head in heads].index("poison_ratio")
    button = heads[place].find_element(By.TAG_NAME, "button")
    button.click()
    assert heads[place].get_attribute("aria-sort") == "ascending"
    up = [float(value) for value in column(chrome, place) if value]
    assert up == sorted(up)
    assert column(chrome, place)[-2:] == ["", ""]
    button.send_keys(Keys.ENTER)
    assert heads[place].get_attribute("aria-sort") == "descending"
    down = [float(value) for value in column(chrome, place) if value]
    assert down == sorted(up, reverse=True)
    # Nothing stands last either way.
    assert column(chrome, place)[-2:] == ["", ""]
    heads[0].find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    assert heads[place].get_attribute("aria-sort") == "none"
    names = column(chrome, 0)
    assert names == sorted(names, key=str.lower)


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_never_scrolls_sideways(chrome: Any, page: Path, width: int) -> None:
    visit(chrome, page, width)
    chrome.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    root = "document.documentElement"
    assert chrome.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")
    assert chrome.execute_script("return innerWidth") == width
    if width < 500:
        scrolls = "const box = document.querySelector('#models .scroll'); box.scrollLeft = 80;"
        assert chrome.execute_script(f"{scrolls} return box.scrollLeft") == 80
        left = "document.querySelector('#main tbody th').getBoundingClientRect().left"
        assert chrome.execute_script(f"return {left}") < 20
        size = "getComputedStyle(document.querySelector('#charts text')).fontSize"
        drawn = "document.querySelector('#charts svg').getBoundingClientRect().width"
        wide = "document.querySelector('#charts svg').viewBox.baseVal.width"
        assert chrome.execute_script(f"return parseFloat({size}) * {drawn} / {wide}") >= 10


def test_dark_is_dark_and_the_choice_is_remembered(chrome: Any, page: Path) -> None:
    from selenium.webdriver.common.by import By

    light, dark = "rgb(255, 255, 255)", "rgb(20, 23, 27)"
    visit(chrome, page)
    assert computed(chrome, "body", "backgroundColor") == light
    visit(chrome, page, scheme="dark")
    assert computed(chrome, "body", "backgroundColor") == dark
    assert computed(chrome, "body", "color") == "rgb(232, 234, 237)"
    # Charts bring their own paper.
    assert computed(chrome, "#charts svg", "backgroundColor") == light
    assert computed(chrome, "#charts text", "fill") == "rgb(0, 0, 0)"
    chrome.find_element(By.CSS_SELECTOR, "button.theme").click()
    assert computed(chrome, "body", "backgroundColor") == light
    chrome.get(page.as_uri())
    assert computed(chrome, "body", "backgroundColor") == light
    assert computed(chrome, "#charts svg", "backgroundColor") == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn(chrome: Any, page: Path, scheme: str) -> None:
    visit(chrome, page, scheme=scheme)
    chrome.execute_script("document.querySelector('#charts').scrollIntoView()")
    shades = screenshot(chrome, page, scheme)[..., :3]
    assert shades.shape[:2] == (900, 1280)
    white = np.isclose(shades[..., 0], 1.0, atol=0.01).mean()
    assert white > (0.5 if scheme == "light" else 0.2)
    if scheme == "dark":  # Charts stand on their own paper on the dark page.
        assert white + np.isclose(shades[..., 0], 20 / 255, atol=0.01).mean() > 0.5
    # Lines and text, and the colours of series.
    assert (np.ptp(shades, axis=2) > 0.3).mean() > 0.001
    assert (shades.std(axis=(0, 1)) > 0.05).all()


def test_a_command_is_copied_or_selected(chrome: Any, page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    visit(chrome, page)
    block = chrome.find_element(By.CSS_SELECTOR, "#failures pre")
    button = block.find_element(By.CSS_SELECTOR, "button.copy")
    button.click()
    WebDriverWait(chrome, 20).until(lambda _: button.text in ("Copied", "Selected"))
    if button.text == "Selected":
        code = block.find_element(By.TAG_NAME, "code").text
        assert chrome.execute_script("return getSelection().toString()").strip() == code.strip()


def test_without_scripts_it_reads_the_same(chrome: Any, page: Path) -> None:
    chrome.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chrome.get(page.as_uri())
        document = chrome.execute_cdp_cmd("DOM.getDocument", {"depth": -1})
        text = json.dumps(document, ensure_ascii=False)
    finally:
        chrome.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "0.9–23.6, n=20" in text
    assert '"BUTTON"' not in text
