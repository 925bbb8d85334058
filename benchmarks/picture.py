"""Makes docs/report.png: the report of the synthetic study, one of its models chosen, in headless Chromium.

python benchmarks/picture.py
"""

import shutil
import tempfile
from pathlib import Path

import synthetic
from playwright import sync_api

from finetune_study import cells, outcome, plan, report
from finetune_study.paths import Results

PICTURE = Path(__file__).parents[1] / "docs" / "report.png"
SHOWN = "llama2-13b"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = synthetic.write(Path(folder))
        results, planned = Results(Path(folder) / "results"), plan.plan(config)
        outcome.write(results, [one.run.run_id for one in planned], config.hardware)
        report.build(config, cells.of_outcomes(planned, results), results)
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 2290})
            page.goto(f"file://{results.report}")
            page.wait_for_selector("html[data-ready]")
            page.select_option("#pick-target", SHOWN)
            page.screenshot(path=PICTURE)
            browser.close()


if __name__ == "__main__":
    main()
