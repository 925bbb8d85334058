"""The report by Snakemake's own means, of a study whose records are made by hand: nothing is trained."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_study import config as config_module
from finetune_study.paths import Results
from finetune_study.plan import plan
from finetune_study.record import write_record
from tests.unit import handmade
from tests.workflow.workplace import Workplace


@pytest.fixture
def reported(fresh: Workplace) -> Workplace:
    """Two recipes at two contexts, all with an outcome."""
    raw = fresh.read()
    raw["grid"][0]["sequence_length"] = [64, 128]
    fresh.write(raw)
    results = Results(fresh.results)
    for number, planned in enumerate(plan(config_module.parse(raw)), start=1):
        write_record(results.run(planned.run.run_id), handmade.completed(planned.run, float(number)))
    answer = fresh.snakemake()
    assert answer.returncode == 0, answer.stdout
    sentence = "The default should be full for tiny on cpu × 1 at context 64 (too few data for a ranking)."
    assert sentence in answer.stdout
    assert f"report: {fresh.results}/report/index.html" in answer.stdout
    again = fresh.snakemake()
    assert sentence not in again.stdout  # nothing was to be done
    return fresh


def variable(page: str, name: str) -> Any:
    """What the page of Snakemake's report sets a variable of its script to."""
    return json.JSONDecoder().raw_decode(page, page.index(f"var {name} = {{") + len(f"var {name} = "))[0]


def test_snakemakes_report_has_captions_categories_and_labels(reported: Workplace) -> None:
    answer = reported.snakemake("--report", "report.zip")
    assert answer.returncode == 0, answer.stdout
    with zipfile.ZipFile(reported.folder / "report.zip") as report:
        page = report.read("report/report.html").decode()
    found, categories = variable(page, "results"), variable(page, "categories")
    names = {
        category: {Path(file).name for files in parts.values() for file in files}
        for category, parts in categories.items()
    }
    assert names["Report"] == {"index.html", "summary.md"}
    kinds = ("feasibility", "recipes", "pareto", "context")
    assert {*categories["Figures"]} == {*kinds, "models"}
    assert names["Figures"] == {*(f"{kind}_tiny_cpu.svg" for kind in kinds), "models_cpu.svg"}
    assert names["Tables"] == {"runs.csv", "comparisons.csv", "recommendations.csv", "costs.csv", "claims.csv"}
    context = found["results/report/figures/context_tiny_cpu.svg"]
    assert context["labels"] == {"figure": "context of tiny_cpu"}
    assert "Memory and time against the context" in context["caption"]
    assert "Every planned run" in found["results/report/tables/runs.csv"]["caption"]
    assert all(one["caption"].strip() for one in found.values())


def test_every_result_opens_in_snakemakes_report(reported: Workplace, browser: Any) -> None:
    """In each category and in what the search finds; a browser, since the page is made by its scripts."""
    answer = reported.snakemake("--report", "report.html")
    assert answer.returncode == 0, answer.stdout
    text = (reported.folder / "report.html").read_text()
    page = browser.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"file://{reported.folder}/report.html")
    rows = page.locator("tbody tr")
    opened: list[str] = []
    for category, kinds in variable(text, "categories").items():
        for kind in kinds:
            page.reload()
            for name in (category, kind) if kind != "Other" else (category,):
                page.get_by_role("link", name=name, exact=True).click()
            rows.first.wait_for()
            for row in rows.all():
                row.locator("a").first.click()
                opened.append(row.inner_text().strip())
    labels = [label for one in variable(text, "results").values() for label in one["labels"].values()]
    assert sorted(opened) == sorted(labels)
    for words in ("cpu", "models_cpu|pareto_tiny_cpu", "report/"):
        page.reload()
        page.get_by_placeholder("Search...").fill(f"re:{words}")
        page.get_by_placeholder("Search...").press("Enter")
        rows.first.wait_for()
        assert rows.count() > 1
    assert complaints == []
    page.close()


def test_two_studies_are_compared_by_their_files_alone(reported: Workplace) -> None:
    """A run that is missing since is not asked for, and changed outcomes are compared anew."""
    outcomes, changes = reported.results / "outcomes.parquet", reported.results / "changes.csv"
    shutil.copy(outcomes, reported.folder / "earlier.parquet")
    record = next(reported.results.glob("runs/*/record.json"))
    record.unlink()
    compare = ("compare", "--config", "earlier=earlier.parquet")
    answer = reported.snakemake(*compare)
    assert answer.returncode == 0, answer.stdout
    assert not record.exists()
    assert f"every change: {changes}" in answer.stdout
    assert "4 of 4 configurations are in both" in (reported.folder / "logs" / "compare.log").read_text()
    assert changes.read_text().count("tiny") == 4
    pl.read_parquet(outcomes).head(3).write_parquet(outcomes)
    assert reported.snakemake(*compare).returncode == 0
    assert changes.read_text().count("tiny") == 3
    assert (
        "given: lost.parquet, which is no file"
        in reported.snakemake("compare", "--config", "earlier=lost.parquet").stdout
    )
    outcomes.unlink()
    assert "There are no outcomes to compare" in reported.snakemake(*compare).stdout
