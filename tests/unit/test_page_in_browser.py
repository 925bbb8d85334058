"""The page in a real browser: Debian's Chromium, driven by Playwright; from a file, as out of a mail.

The study is synthetic and says so. Screenshots stay in build/screenshots, to be looked at.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks import synthetic

from finetune_study import cells, outcome, plan, report, table
from finetune_study.paths import Results
from tests.debian import need
from tests.unit import handmade

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 1000}
EVIL = '<img src=x onerror="window.executed=1"><script>window.executed=1</script>'


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a synthetic study, one run of which has HTML in its reason and in its log."""
    folder = tmp_path_factory.mktemp("synthetic")
    config = synthetic.write(folder, repeats=3)
    results, planned = Results(folder / "results"), plan.plan(config)
    for one in planned:
        results.run(one.run.run_id).log.write_text("synthetic: the allocator has nothing left\n")
    outcome.write(results, [one.run.run_id for one in planned], config.hardware)
    frame = cells.of_outcomes(planned, results)
    first = frame["run_id"] == frame.filter(frame["state"] == "failed")["run_id"][0]
    for name in ("failure_cause", "failure_log_tail"):
        frame = frame.with_columns(frame[name].set(first, f"{EVIL} in {name}").alias(name))
    report.build(config, frame, results)
    return results.report


class Opened:
    """A page with everything that it asked for and complained of."""

    def __init__(self, browser: Any, file: Path, anchor: str = "", **settings: Any) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page = browser.new_page(**{"viewport": DESK} | settings)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(f"file://{file}{anchor}")
        self.page.wait_for_selector("html[data-ready]", timeout=30_000)

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.page.locator(selector).all_inner_texts()
        return found

    def column(self, title: str) -> list[str]:
        """The table of runs as shown, one column."""
        headings = [text.splitlines()[0] for text in self.texts("#headings th")]
        return self.texts(f"#rows tr td:nth-child({headings.index(title) + 1})")

    def screenshot(self, name: str, **settings: Any) -> None:
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", **settings)


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Opened]:
    one = Opened(browser, page_file)
    yield one
    assert one.complaints == []
    assert [url for url in one.requests if not url.startswith("file://")] == []
    assert one.page.evaluate("window.executed") is None
    one.page.close()


def test_it_opens_from_a_file_and_asks_for_nothing_else(opened: Opened, page_file: Path) -> None:
    assert opened.requests == [f"file://{page_file}"]
    assert opened.page.locator(".notice").inner_text().startswith("Synthetic: no run took place.")
    assert len(opened.texts(".answer li")) == 3
    opened.screenshot("light")
    opened.screenshot("whole", full_page=True)


def test_the_table_of_runs_sorts_filters_finds_and_turns_pages(opened: Opened) -> None:
    page = opened.page
    assert "1–25 of 6,384" in page.locator("#place").inner_text()
    page.select_option("select[data-filter=state]", "completed")
    page.get_by_role("button", name="Step time s, median").click()
    times = [float(text) for text in opened.column("Step time")]
    assert times == sorted(times)
    assert len(times) == 25
    page.get_by_role("button", name="Step time s, median").click()
    slowest = [float(text.replace(",", "")) for text in opened.column("Step time")]
    assert slowest == sorted(slowest, reverse=True)
    assert slowest[0] > times[-1]
    page.select_option("select[data-filter=target]", "llama2-70b")
    page.fill("#find", "zero3-lora-gc-flash")
    assert {*opened.column("Target")} == {"llama2-70b"}
    assert {*opened.column("Recipe")} == {"zero3-lora-gc-flash"}
    page.fill("#find", "")
    first = opened.column("Run")
    page.get_by_role("button", name="Next").click()
    assert not {*first} & {*opened.column("Run")}
    assert "26–50" in page.locator("#place").inner_text()
    page.fill("#find", "no such run")
    assert page.locator("#place").inner_text() == "no run"
    assert page.locator("#rows").inner_text().startswith("No run matches.")
    page.get_by_role("button", name="Clear the filter").click()
    assert "1–25 of 6,384" in page.locator("#place").inner_text()
    assert page.locator("#find").evaluate("(it) => it === document.activeElement")


def test_a_status_is_sorted_by_the_words_that_are_shown(opened: Opened) -> None:
    page = opened.page
    options = opened.texts("select[data-filter=state] option")[1:]
    assert options == sorted(options)
    assert "out of host memory" in options
    page.get_by_role("button", name="Status").click()
    ends = [opened.column("Status")[0]]
    page.get_by_role("button", name="Status").click()
    ends.append(opened.column("Status")[0])
    assert [re.sub(r"^\W+", "", text) for text in ends] == [options[0], options[-1]]


def test_the_search_finds_each_word_wherever_the_row_has_it(opened: Opened) -> None:
    page = opened.page

    def found(words: str) -> str:
        page.fill("#find", words)
        return str(page.locator("#place").inner_text()).partition(" of ")[2]

    for state in ("completed", "timeout", "device_oom"):
        page.select_option("select[data-filter=state]", state)
        every = found("")
        page.select_option("select[data-filter=state]", "")
        assert int(every.replace(",", "")) > 0
        assert found(state) == every
        words = str(page.locator(f"select[data-filter=state] option[value={state}]").inner_text())
        page.select_option("select[data-filter=state]", state)
        assert found(words.upper()) == every, "as the table says it"
        page.select_option("select[data-filter=state]", "")
    found("zero3-lora  llama2-70b a100")
    assert {*opened.column("Target")} == {"llama2-70b"}
    assert {*opened.column("Hardware")} == {"a100-80gb"}
    assert all("zero3-lora" in recipe for recipe in opened.column("Recipe"))
    found("llama2-70b llama2-7b")
    assert page.locator("#place").inner_text() == "no run"


def test_a_click_anywhere_in_a_row_opens_its_run(opened: Opened) -> None:
    page = opened.page
    page.locator("#rows tr").nth(2).locator("td").nth(3).click()
    page.locator("#panel").wait_for()
    assert page.locator("#panel-title").inner_text() == opened.column("Run")[2]
    page.keyboard.press("Escape")
    page.wait_for_function("location.hash === '#runs'")


def test_the_script_writes_numbers_as_the_rest_of_the_report_does(opened: Opened) -> None:
    values = [0.0, 1.0, 2.125, 0.12345, 45.67, 999.0, 999.4, 999.5, 999.7, 1000.5, 2472.4, 1234567.0, 1.23e-5, -0.5]
    assert opened.page.evaluate("(values) => values.map(measured)", values) == [table.show(value) for value in values]
    opened.page.select_option("select[data-filter=state]", "completed")
    assert opened.column("Context")[0] == "256"
    assert all(text == table.show(float(text.replace(",", ""))) for text in opened.column("Tokens/s"))


def test_a_cell_of_the_map_says_its_numbers_and_leads_to_its_run(opened: Opened) -> None:
    page = opened.page
    cell = page.locator("#feasibility figure svg a").first
    cell.hover()
    name, *facts = page.locator("#tip > *").all_inner_texts()
    assert name == "llama2-7b, a100-80gb × 1, context 256"
    assert 3 < len(facts) <= 8
    assert page.locator("#tip span").all_inner_texts()[:3] == ["Recommended", "Verdict", "Step time"]
    for kind in ("bar", "point"):
        page.locator(
            f"#figures a:has([aria-roledescription={kind}]), #tradeoff a:has([aria-roledescription={kind}])"
        ).first.hover()
        assert "Peak memory" in page.locator("#tip").inner_text()
    cell.click()
    title = page.locator("#panel-title").inner_text()
    assert title.startswith("llama2-7b_a100-80gbx")
    text = page.locator("#panel").inner_text()
    assert f"/runs/{title}/run.yaml" in text
    assert "step_time_seconds_samples" in text
    values = dict(zip(opened.texts("#panel dt"), opened.texts("#panel dd"), strict=True))
    assert values["training.learning_rate"] == "0.0004"
    assert values["techniques.eager"] == "nothing set"
    assert "{" not in "".join(values.values())
    assert "attempts" in values
    assert "attempt" not in values
    opened.screenshot("panel")
    page.keyboard.press("Escape")
    assert not page.locator("#panel").is_visible()


def test_a_run_that_ran_out_of_memory_says_how(opened: Opened) -> None:
    page = opened.page
    page.select_option("select[data-filter=state]", "device_oom")
    page.locator("#rows a").first.click()
    page.locator("#panel").wait_for()
    text = page.locator("#panel").inner_text()
    for name in ("oom_phase", "oom_step", "oom_requested_gib", "oom_held_gib", "slurm_job_id", "software_sha256"):
        assert name in text
    assert "synthetic: the allocator" in text
    page.keyboard.press("Escape")


def test_html_in_a_log_is_shown(opened: Opened) -> None:
    page = opened.page
    page.select_option("select[data-filter=state]", "failed")
    page.fill("#find", "onerror")
    page.locator("#rows a").first.click()
    page.locator("#panel").wait_for()
    assert f"{EVIL} in failure_log_tail" in page.locator("#panel").inner_text()
    page.keyboard.press("Escape")


def test_one_model_at_a_time(opened: Opened) -> None:
    page = opened.page
    page.select_option("#pick-target", "llama2-13b")
    page.select_option("#pick-hardware", "v100-32gb")
    shown = page.locator("figure:not([hidden]) figcaption b").all_text_contents()
    assert any("llama2-13b" in title for title in shown)
    assert all("llama2-13b on v100-32gb" in title or "Which mix" in title for title in shown)
    claims = page.locator("#claims tbody tr:not([hidden]) td:first-child").all_text_contents()
    assert any(place.startswith("llama2-13b, v100-32gb × ") for place in claims)
    assert all(place.startswith("llama2-13b, v100-32gb") or place == "llama2-13b" for place in claims)


def test_the_keyboard_reaches_contents_cells_and_headings(opened: Opened) -> None:
    page = opened.page
    page.locator("#feasibility figure svg a").nth(1).focus()
    assert not page.locator("#tip").is_hidden()
    page.keyboard.press("Enter")
    page.locator("#panel").wait_for()  # the address changes first, the panel follows
    page.keyboard.press("Escape")
    page.locator("#headings button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#headings th").first.get_attribute("aria-sort") == "ascending"


def test_tab_stops_once_in_a_figure_and_arrow_keys_reach_its_marks(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    stops = 0
    while page.evaluate("document.activeElement !== document.body") and stops < 1000:
        page.keyboard.press("Tab")
        stops += 1
    assert 50 < stops <= 300
    links = page.locator("#feasibility figure svg").first.locator("a")
    links.first.focus()
    said = []
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "End", "End", "ArrowRight", "Home"):
        page.keyboard.press(key)
        said.append(
            page.evaluate(
                "[...document.activeElement.closest('svg').querySelectorAll('a')].indexOf(document.activeElement)"
            )
        )
    last = links.count() - 1
    assert said == [1, 2, 1, last, last, last, 0]
    assert not page.locator("#tip").is_hidden()
    page.keyboard.press("End")
    assert links.first.get_attribute("tabindex") == "-1"
    assert links.last.get_attribute("tabindex") == "0"


def test_the_dark_page_is_dark_and_legible(browser: Any, page_file: Path) -> None:
    dark = Opened(browser, page_file, color_scheme="dark")
    page = dark.page
    colours = page.evaluate("""() => {
        const parse = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const body = getComputedStyle(document.body);
        const cell = document.querySelector("#feasibility figure svg a path");
        const word = document.querySelector("#feasibility .mark-text text");
        return { paper: parse(body.backgroundColor), ink: parse(body.color), fill: parse(getComputedStyle(cell).fill),
                 word: parse(getComputedStyle(word).fill) };
    }""")
    assert contrast(colours["paper"], colours["ink"]) > 7
    assert contrast(colours["fill"], colours["word"]) > 4.5
    assert luminance(colours["paper"]) < 0.05
    page.evaluate("document.getElementById('feasibility').scrollIntoView()")
    dark.screenshot("dark")
    assert dark.complaints == []
    page.close()


def luminance(colour: list[float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2)."""
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: list[float], other: list[float]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_narrow_window_scrolls_in_one_direction_alone(browser: Any, page_file: Path) -> None:
    phone = Opened(browser, page_file, viewport=PHONE)
    assert phone.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    phone.screenshot("phone")
    rows = phone.page.locator("#table .scroll")
    rows.evaluate("(it) => { it.scrollLeft = 500; }")
    status = phone.page.locator("#rows td").first.bounding_box()
    assert status["x"] == rows.bounding_box()["x"], "it stays in sight"
    assert status["width"] < 80, "a symbol, which leaves room for the others"
    assert phone.page.locator("#rows a").first.get_attribute("aria-label").startswith("out of memory: llama2-7b")
    assert phone.complaints == []
    phone.page.close()


def test_it_prints_to_pdf(browser: Any, page_file: Path) -> None:
    printed = Opened(browser, page_file)
    folded = printed.page.locator("details:not([open])").count()
    assert folded > 10
    written = printed.page.pdf(path=SCREENSHOTS / "print.pdf", prefer_css_page_size=True)
    assert written.startswith(b"%PDF")
    headings = {text.strip() for text in printed.texts("section:has(> .figures) > :is(h2, h3), .fold > summary")}
    assert printed.page.locator("details:not([open])").count() == folded  # closed again
    printed.page.close()
    need("pdftotext", "poppler-utils")
    command = ["pdftotext", "-layout", str(SCREENSHOTS / "print.pdf"), "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pages = [[line.strip() for line in page.splitlines() if line.strip()] for page in text.split("\f")]
    assert headings & {line for lines in pages for line in lines}
    assert "finetune-study export llama2-7b a100-80gb" in text
    assert "Every column of the comparisons" in text
    assert "On paper: 1–25 of 6,384, and not every column." in text
    assert "Not on paper: all of them are in tables/recommendations.csv" in text
    assert re.search(r"Setting\s+Recommended\s+Verdict\s+Why", text) is None
    assert "torch 2.13.0" in " ".join(pages[0]), "versions are on the first page"
    # The defaults can be read at one look: their reasons stand below the table.
    defaults, _, reasons = text.partition("Why, and what would settle it, and how to use it")
    assert "falcon-180b on v100-32gb × 8" in " ".join(defaults.split())
    assert "a step (3 runs" not in defaults
    assert "a step (3 runs" in reasons.partition("What fits where")[0]
    assert table.COLUMNS["step_time_ratio"][1] in " ".join(text.split())
    assert len(pages) < 60
    # A heading of figures has one of them below it on its page, not its introduction alone, of at most five lines.
    assert [line for lines in pages for line in lines[-6:] if line in headings] == []


def test_what_is_printed_fills_the_sheet_and_goes_no_farther(browser: Any, page_file: Path) -> None:
    sheet = round((210 - 2 * 12) / 25.4 * 96)  # A4 less its margins, in pixels of CSS
    printed = Opened(browser, page_file, viewport={"width": sheet, "height": 1000})
    printed.page.emulate_media(media="print")
    table = "document.querySelector('#table .scroll')"
    assert printed.page.evaluate(f"{table}.scrollWidth") <= sheet
    assert printed.page.evaluate(f"getComputedStyle({table}).maskImage") == "none"
    sizes = printed.page.evaluate(
        """() => [...document.querySelectorAll("figure svg")].map((svg) => {
        const box = svg.getBoundingClientRect(), drawn = svg.viewBox.baseVal;
        return [Math.min(box.width, box.height * drawn.width / drawn.height), drawn.width];
    }).filter(([width]) => width)"""
    )
    assert len(sizes) > 30
    assert min(width for width, _ in sizes) > 0.6 * sheet
    assert max(width for width, _ in sizes) <= sheet
    assert max(width / drawn for width, drawn in sizes) <= 1.301, "letters are no larger than a heading's"
    printed.page.close()


def test_a_link_opens_the_panel_of_its_run(browser: Any, page_file: Path) -> None:
    runs = (page_file.parent / "tables" / "runs.csv").read_text().splitlines()
    run_id = runs[1].partition(",")[0]
    linked = Opened(browser, page_file, f"#run={run_id}")
    assert linked.page.locator("#panel-title").inner_text() == run_id
    linked.page.close()


@pytest.mark.parametrize("case", ["empty", "one run", "all out of memory", "unicode", "a hundred recipes"])
def test_odd_studies_give_a_page_without_complaints(browser: Any, tmp_path: Path, case: str) -> None:
    grid = {"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora"], "sequence_length": 128}
    recipes: dict[str, Any] = {"full": {}, "lora": {"lora": {}}}
    title = "Über 学習 \N{GRINNING FACE} <b>"
    if case == "a hundred recipes":
        recipes = {f"lora-{rank}": {"lora": {"r": rank}} for rank in range(1, 101)}
        grid |= {"recipes": list(recipes)}
    models = {"tiny": handmade.LLAMA}
    if case == "unicode":
        models, recipes = {"模型-ü": handmade.LLAMA}, {"полный": {}, "lora-é": {"lora": {}}}
        grid |= {"targets": [*models], "recipes": [*recipes]}
    report_title = {"title": title if case == "unicode" else case}
    config = handmade.study(models=models, recipes=recipes, grid=[grid], report=report_title)
    records = []
    for number, one in enumerate(plan.plan(config)):
        oom = case == "all out of memory" or (case == "one run" and number > 0)
        records.append(handmade.out_of_memory(one.run) if oom else handmade.completed(one.run, 1.0 + number / 100))
    frame = handmade.frame(config, tmp_path, *records)
    if case in ("empty", "one run"):
        frame = frame.head(0 if case == "empty" else 1)
    results = Results(tmp_path)
    report.build(config, frame, results)
    shown = Opened(browser, results.report)
    assert shown.page.locator("h1").inner_text() == (title if case == "unicode" else case)
    assert shown.complaints == []
    shown.screenshot(f"odd-{case.replace(' ', '-')}", full_page=True)
    assert json.dumps(shown.texts(".answer li"))
    if case == "unicode":
        assert "模型-ü" in shown.texts(".answer li")[0]
        shown.page.locator("#rows a").first.click()
        assert shown.page.locator("#panel-title").inner_text().startswith("模型-ü_cpux1_s128_b1_")
    shown.page.close()
