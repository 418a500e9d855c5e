"""The report in a real browser: pointer, keyboard, search, hostile text, colours, narrow windows.

`python tests/test_report_browser.py docs/report.png` draws the picture of docs/report.md.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from report_jobs import of_text, real_rows, write_job

from nla_hub.report import write
from nla_hub.report.write import write_report
from nla_hub.results import Explanation, Explanations

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no chromium on the path", allow_module_level=True)

ATTACKS = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "<svg onload=alert(3)>",
    "javascript:alert(4)",
    "<!--<script>",
    "{{7*7}}",
)
WORDS = ["The", " cat", " sat", ".", "\n\n", "Then", " it", " slept", " on", " a", " mat", " \u65e5\u672c", "  ", "!"]
TEXT = "".join(WORDS)
ANIMALS = ("cat", "ship", "song")


def plain_rows(words: Sequence[str] = WORDS) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for d in range(4):
        rows += of_text(
            words,
            document=d,
            first=len(rows),
            doc_id=f"document-{d}",
            cosine=lambda i, d=d: 1 - ((d * 14 + i) % 50) / 40,
            text=lambda i, d=d: f"A word about a {ANIMALS[i % 3]}; number {d}x{i} (really)",
        )
    rows[2] |= {"status": "no_tags", "text": None, "raw": "raw words", "cosine": None, "mse": None}
    rows[3] |= {"status": None, "text": None, "raw": None, "cosine": None, "mse": None, "error": "the vector is NaN"}
    rows[4] |= {"cosine": None, "mse": None, "error": "Not scored: too long for the AR"}
    rows[-1] |= {"status": None, "text": None, "raw": None, "cosine": None, "mse": None, "norm": None, "copy_of": 13}
    return rows


def hostile_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for d, attack in enumerate(ATTACKS):
        own = of_text([attack, "x" * 300], document=d, first=len(rows), doc_id=attack, text=attack, flags=[attack])
        own[1] |= {"status": None, "text": None, "raw": None, "cosine": None, "mse": None, "error": attack}
        rows += own
    rows += of_text(
        [f"t{i}" for i in range(12)],
        document=9,
        first=len(rows),
        text=lambda i: f"{ATTACKS[i % 6]} {i}",
        doc_id="\u202eabc",
    )
    return rows


def hostile_config() -> dict[str, Any]:
    return {"nla": ATTACKS[0], "base_model": ATTACKS[1], "data": {ATTACKS[2]: ATTACKS[1]}, "positions": ATTACKS[0]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reports")
    plain = write_job(root / "plain", plain_rows())
    ended = [*WORDS, ""]  # the end of the sequence: a token without text
    a = write_job(root / "a", plain_rows(ended))
    others = [
        row | {"text": f"other words {row['row']}", "cosine": 0.1, "mse": 1.8, "status": "ok"}
        for row in plain_rows(ended)
    ]
    b = write_job(root / "b", others, config={"site": {"layer": 9}})
    hostile = write_job(root / "hostile", hostile_rows(), config=hostile_config())
    return {
        "plain": write_report([plain], map_by="tsne"),
        "two": write_report([a, b], root / "two.html", map_by="off"),
        "hostile": write_report([hostile], map_by="tsne"),
    }


class Watched:
    """A page that remembers whatever it must not do."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.dialogs: list[str] = []
        self.messages: list[str] = []
        self.requests: list[str] = []
        page.on("dialog", self._dialog)
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def _dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def is_quiet(self, url: str) -> bool:
        """Nothing was said, asked or fetched but the page itself."""
        return not self.dialogs and not self.messages and set(self.requests) <= {url}


@pytest.fixture(scope="module")
def window(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    context.set_default_timeout(5000)
    yield context
    context.close()


@pytest.fixture
def visit(window: Any, reports: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Opens a report; afterwards nothing may have been said, asked or fetched."""
    watched: list[tuple[Watched, str]] = []

    def open_page(name: str, end: str = "") -> Any:
        url = reports[name].as_uri()
        watched.append((Watched(window.new_page()), url))
        watched[-1][0].page.goto(url + end)
        return watched[-1][0].page

    yield open_page
    found = [(one.dialogs, one.messages, one.requests) for one, url in watched if not one.is_quiet(url)]
    for one, _ in watched:
        one.page.close()
    assert not found


def tokens(page: Any, document: int = 0, pair: int = 0) -> Any:
    return page.locator(".document").nth(document).locator(".text").nth(pair).locator(".tok")


def panel(page: Any) -> str:
    return str(page.locator("#panel").inner_text())


def focused(page: Any) -> str:
    return str(page.evaluate("document.activeElement.textContent"))


def test_the_text_stands_there_exactly(visit: Callable[..., Any]) -> None:
    page = visit("plain")
    assert page.locator(".document .text").all_text_contents() == [TEXT] * 4
    classes = tokens(page).evaluate_all("all => all.slice(0, 5).map(one => one.className)")
    assert [name.split()[1] for name in classes] == ["e0", "e0", "unusable", "failed", "unscored"]


def test_pointer(visit: Callable[..., Any]) -> None:
    page = visit("plain")
    tokens(page).nth(1).hover()
    assert "number 0x1 (really)" in panel(page)
    assert "cosine 0.975" in panel(page)
    page.mouse.move(2, 2)
    assert "number 0x1" in panel(page)  # it stays to be read
    tokens(page).nth(2).hover()
    assert "No usable explanation: no_tags" in panel(page)
    assert "raw words" in panel(page)
    tokens(page).nth(3).hover()
    assert "In error" in panel(page)
    assert "the vector is NaN" in panel(page)
    tokens(page).nth(4).hover()
    assert "number 0x4" in panel(page)
    assert "Not scored: too long for the AR" in panel(page)
    tokens(page, 3).last.hover()
    assert "Not filled in yet: a copy of row 13" in panel(page)
    assert "usable" not in panel(page)
    tokens(page).nth(6).click()
    assert tokens(page).nth(6).get_attribute("aria-pressed") == "true"
    tokens(page, 2).nth(9).hover()
    assert "number 0x6" in panel(page)
    page.keyboard.press("Escape")
    assert page.locator("[aria-pressed=true]").count() == 0
    tokens(page, 2).nth(9).hover()
    assert "number 2x9" in panel(page)
    tokens(page).nth(6).click()
    page.get_by_role("button", name="Unpin").click()
    assert page.locator("[aria-pressed=true]").count() == 0


def test_keyboard(visit: Callable[..., Any]) -> None:
    page = visit("plain")
    assert page.locator("#documents [tabindex='0']").count() == 1
    page.locator("#after").focus()
    page.keyboard.press("Tab")
    assert focused(page) == "The"
    assert "number 0x0" in panel(page)
    for key, expected in (
        ("ArrowRight", " cat"),
        ("End", "!"),
        ("ArrowLeft", "  "),
        ("Home", "The"),
        ("ArrowLeft", "The"),
    ):
        page.keyboard.press(key)
        assert focused(page) == expected
    page.keyboard.press("ArrowDown")
    below = page.evaluate("document.activeElement.getBoundingClientRect().top")
    assert below > tokens(page).first.bounding_box()["y"] + 10
    page.keyboard.press("ArrowUp")
    assert focused(page) == "The"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    live = page.locator("#live")
    assert "number 0x1" in live.text_content()
    tokens(page).nth(4).focus()
    assert "number 0x4 (really). Not scored: too long" in live.text_content()
    tokens(page, 3).last.focus()
    assert "not filled in yet, a copy of row 13" in live.text_content()
    tokens(page).nth(1).focus()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    assert focused(page) == " sat"
    assert "number 0x1" in panel(page)
    page.keyboard.press("Escape")
    assert page.locator("[aria-pressed=true]").count() == 0
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.closest('.document').textContent").startswith("document-1")
    assert page.locator("#documents [tabindex='0']").count() == 1


def test_search(visit: Callable[..., Any]) -> None:
    page = visit("plain")
    page.keyboard.press("/")
    page.keyboard.type("ABOUT A Ship; number 1X1 (")
    assert page.locator("#hits").inner_text() == "1 row in 1 document"
    assert page.locator("mark").inner_text() == "about a ship; number 1x1 ("
    assert page.locator(".hit").all_text_contents() == [" cat"]
    page.locator("#q").fill("slept")
    assert page.locator("#hits").inner_text() == "4 rows in 4 documents"
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.locator("#hits").inner_text() == "token 2 of 4"
    assert "number 1x7" in panel(page)
    assert page.locator("[aria-pressed=true].hit-now").count() == 1
    page.keyboard.press("Shift+Enter")
    assert "number 0x7" in panel(page)
    page.locator("#found .jump").nth(3).click()
    assert "number 3x7" in panel(page)
    page.locator("#q").fill("nowhere .*")
    assert page.locator("#hits").inner_text() == "no row"
    page.locator("#q").fill("NaN")
    assert page.locator("#found li").count() == 1
    page.keyboard.press("Escape")
    assert (page.locator("#q").input_value(), page.locator(".hit").count()) == ("", 0)


def test_lists_lead_to_tokens_and_links_to_rows(visit: Callable[..., Any]) -> None:
    page = visit("plain")
    worst = page.locator("tbody[data-list=worst] tr")
    errors = [float(value) for value in worst.locator("td:first-child").all_inner_texts()]
    assert errors == sorted(errors, reverse=True)
    words = worst.nth(3).locator("td.words").inner_text()
    worst.nth(3).locator("button").click()
    assert words in panel(page)
    assert page.locator("[aria-pressed=true]").evaluate(
        "one => { const box = one.getBoundingClientRect(); return box.top > 0 && box.bottom < innerHeight; }"
    )
    end = page.evaluate("location.hash")
    assert words in panel(visit("plain", end))
    assert "raw words" in page.locator("tbody[data-list=unusable]").text_content()
    assert "the vector is NaN" in page.locator("tbody[data-list=failed]").text_content()


def test_the_map_and_the_tokens_know_each_other(visit: Callable[..., Any]) -> None:
    page = visit("plain")
    points = page.locator(".point")
    assert points.count() == 53  # three of the 56 rows have no explanation
    label = points.nth(20).get_attribute("aria-label").removeprefix("1 row: ")
    points.nth(20).dispatch_event("click")
    assert label in panel(page)
    assert label.split("number ")[1] in page.locator("#live").text_content()
    ring, point = page.locator(".rings circle"), points.nth(20)
    assert ring.count() == 1
    assert ring.get_attribute("cx") == point.get_attribute("cx")
    page.keyboard.press("Escape")
    tokens(page, 1).nth(5).hover()
    assert ring.get_attribute("cx") == page.locator("[aria-label$='1x5 (really)'].point").get_attribute("cx")
    page.locator("#plot [tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#plot [tabindex='0']").count() == 1
    words = page.evaluate("document.activeElement.getAttribute('aria-label')").removeprefix("1 row: ")
    assert words in panel(page)
    page.keyboard.press("Enter")
    assert page.locator("[aria-pressed=true].tok").count() == 1
    page.locator("#groups button").first.click()
    n = int(page.locator("#groups li").first.inner_text().split("n=")[1].split(",")[0])
    assert page.locator(".point.faded").count() == 53 - n


def test_two_jobs_side_by_side(visit: Callable[..., Any]) -> None:
    page = visit("two")
    assert page.locator(".document").first.locator(".side").count() == 2
    left, right = (page.locator(".document").first.locator(".side").nth(i).bounding_box() for i in (0, 1))
    assert right["x"] > left["x"] + left["width"] - 1
    tokens(page).nth(6).hover()
    assert "number 0x6" in panel(page)
    assert "other words 6" in panel(page)
    assert tokens(page, 0, 1).nth(6).evaluate("one => one.classList.contains('current')")
    tokens(page).last.hover()
    assert "number 0x14" in panel(page)
    assert "other words 14" in panel(page)
    assert tokens(page, 0, 1).last.evaluate("one => one.classList.contains('current')")
    tokens(page, 0, 1).nth(7).click()
    assert "number 0x7" in panel(page)
    page.keyboard.press("ArrowRight")
    assert focused(page) == " on"
    assert page.evaluate("document.activeElement.closest('.side').textContent").startswith("tiny, layer 9")


def test_hostile_text_stays_text(visit: Callable[..., Any]) -> None:
    page = visit("hostile")
    assert page.evaluate("document.querySelectorAll('img, iframe, script, svg[onload]').length") == 2  # data and script
    for d in range(len(ATTACKS)):
        titles = page.locator(".document .title").all_text_contents()
        tokens(page, d).first.click()
        attack = titles[d]
        assert attack in ATTACKS
        assert attack in page.locator("#panel").text_content()
        assert attack in page.locator("#live").text_content()
        tokens(page, d).nth(1).click()
        assert attack in page.locator("#panel .raw").text_content()
    page.locator("#q").fill("<script>alert")
    assert page.locator("#found mark").first.text_content() == "<script>alert"
    page.locator(".point").first.dispatch_event("click")
    body = page.locator("main").text_content()
    assert all(body.count(attack) >= 4 for attack in ATTACKS)
    assert page.evaluate("document.querySelectorAll('img, iframe, script, svg[onload]').length") == 2


def test_the_policy_refuses_every_fetch(browser: Any, reports: dict[str, Path]) -> None:
    page = browser.new_page()
    watched, refused = Watched(page), []
    page.on("requestfailed", lambda request: refused.append((request.url, request.failure)))
    page.goto(reports["plain"].as_uri())
    assert page.evaluate("fetch('https://example.org').then(() => 'fetched', () => 'refused')") == "refused"
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'https://example.org/a.png'}))")
    page.evaluate("document.body.setAttribute('onclick', 'alert(5)'); document.body.click()")
    page.wait_for_timeout(50)
    assert refused == [("https://example.org/a.png", "csp")]
    assert set(watched.requests) - {refused[0][0]} == {reports["plain"].as_uri()}
    assert not watched.dialogs
    assert all("Content Security Policy" in message for message in watched.messages)
    page.close()


def test_the_check_of_hostile_text_can_fail(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, right, wrong = write._resource, "element.textContent = text", "element.innerHTML = text"
    monkeypatch.setattr(write, "_resource", lambda name: real(name).replace(right, wrong))
    place = write_report([write_job(tmp_path / "out", hostile_rows())], map_by="off")
    page = browser.new_page()
    watched = Watched(page)
    page.goto(place.as_uri())
    assert page.locator("img").count() > 0
    page.wait_for_timeout(50)
    assert not watched.is_quiet(place.as_uri())
    page.close()


CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const one of document.querySelectorAll('body *:not(script):not(svg *)')) {
    const text = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!text || !one.checkVisibility() || one.closest('.unseen, .skip')) continue;
    const [a, b] = [light(parse(getComputedStyle(one).color)), light(behind(one))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) poor.push(`${one.tagName}.${one.className}: ${one.textContent.slice(0, 30)}`);
  }
  return poor;
}"""


def test_everything_can_be_read_in_both_schemes(visit: Callable[..., Any]) -> None:
    page = visit("plain")
    page.locator("#q").fill("ship")
    tokens(page).nth(6).click()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        back = page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")
        assert (sum(map(int, back)) > 600) == (scheme == "light")
        assert page.evaluate(CONTRAST) == []
    page.evaluate("document.querySelector('.lead').style.color = getComputedStyle(document.body).backgroundColor")
    assert len(page.evaluate(CONTRAST)) == 1


@pytest.mark.parametrize("name", ["plain", "two", "hostile"])
def test_the_page_never_scrolls_sideways(visit: Callable[..., Any], name: str) -> None:
    page = visit(name)
    tokens(page, 1).nth(1).click()
    page.locator("#q").fill("a")
    for width, height in ((360, 740), (640, 450), (1280, 900)):  # a phone, a window of 1280 pixels at 200 %, a window
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator("#panel").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        if width < 1000:
            assert box["height"] <= 0.45 * height
            assert page.locator("#panel").evaluate("one => getComputedStyle(one).position") == "fixed"


AUDIT = """() => {
  const faults = [];
  const ids = [...document.querySelectorAll('[id]')].map((one) => one.id);
  for (const id of ids.filter((id, i) => ids.indexOf(id) !== i)) faults.push(`id twice: ${id}`);
  for (const name of ['aria-labelledby', 'aria-describedby', 'for'])
    for (const one of document.querySelectorAll(`[${name}]`))
      for (const id of one.getAttribute(name).split(' ')) if (!document.getElementById(id)) faults.push(`no ${id} for ${name}`);
  const named = (one) => (one.getAttribute('aria-label') || one.textContent || '').trim() || one.getAttribute('aria-labelledby')
    || (one.labels && one.labels.length);
  const named_kinds = 'button, input, [role=button], [role=region], [role=group], [role=img], aside, table th';
  for (const one of document.querySelectorAll(named_kinds))
    if (!named(one)) faults.push(`no name: ${one.outerHTML.slice(0, 80)}`);
  let level = 0;
  for (const one of document.querySelectorAll('main h1, main h2, main h3, main h4')) {
    const own = Number(one.tagName[1]);
    if (own > level + 1) faults.push(`heading ${own} after ${level}: ${one.textContent}`);
    level = own;
  }
  if (document.querySelectorAll('h1').length !== 1) faults.push('not one h1');
  for (const one of document.querySelectorAll('th:not([scope])')) faults.push(`th without scope: ${one.textContent}`);
  if (document.querySelector('[aria-hidden=true] [tabindex], [aria-hidden=true] button')) faults.push('hidden focus');
  for (const one of document.querySelectorAll('[tabindex]')) if (one.tabIndex > 0) faults.push('tabindex above 0');
  for (const one of document.querySelectorAll('button, input')) {
    const box = one.getBoundingClientRect();
    if (box.width && Math.min(box.height, box.width) < 24) faults.push(`small: ${one.outerHTML.slice(0, 80)}`);
  }
  if (!document.documentElement.lang || !document.title) faults.push('no language or title');
  return faults;
}"""


@pytest.mark.parametrize("name", ["plain", "two", "hostile"])
def test_names_roles_and_targets(visit: Callable[..., Any], name: str) -> None:
    page = visit(name)
    tokens(page).nth(1).click()
    page.locator("#q").fill("a")
    assert page.evaluate(AUDIT) == []
    page.evaluate(
        "document.querySelector('main').append(document.createElement('button'), document.createElement('h4'))"
    )
    assert page.evaluate(AUDIT) != []


def test_a_page_without_scripts_still_has_its_figures(browser: Any, reports: dict[str, Path]) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(reports["plain"].as_uri())
    text = page.locator("main").inner_text()
    assert "FVE (raw variance, made-up-rows" in text
    assert "need scripts" in text
    assert page.locator(".chart svg").count() == 4
    page.close()


def test_a_notebook_shows_an_explanation_where_the_focus_is(browser: Any) -> None:
    rows = Explanations(
        (
            Explanation(f"{ATTACKS[0]} said", "", "ok", 1.0, 0.9, 0.2, doc_id="d", position=0, token="<b>one"),
            Explanation(None, ATTACKS[1], "no_tags", 1.0, doc_id="d", position=1, token=" two"),
        )
    )
    page = browser.new_page()
    watched = Watched(page)
    page.set_content(rows.to_html())
    first = page.locator(".nla-text span").first
    first.click()
    shown = first.evaluate("one => getComputedStyle(one, '::after').content")
    assert "alert(1)" in shown
    assert page.locator(".nla-text").text_content() == "<b>one two"
    assert watched.is_quiet("about:blank")
    page.close()


def draw(target: Path) -> None:
    """The picture of docs/report.md: documents of the tiny world, explained by the packaged pair."""
    from nla_hub import NLA

    nla = NLA.from_pretrained("tiny")
    reference = nla.explain("a", temperature=0).reference
    assert reference is not None
    config = {"reference": asdict(reference), "base_model": "tiny-source", "data": {"path": "world.jsonl"}}
    with tempfile.TemporaryDirectory() as folder, playwright_api.sync_playwright() as playwright:
        place = write_report([write_job(Path(folder) / "out", real_rows(nla, 12), config=config, manifest={})])
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 860}, color_scheme="light")
        page.goto(place.as_uri())
        page.locator(".tok.e3", has_text="lantern").first.click()
        page.evaluate("document.querySelector('#tokens').scrollIntoView()")
        page.mouse.move(1239, 859)
        page.screenshot(path=str(target))
        browser.close()


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
