import html
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from finetune_study import cli
from finetune_study.paths import Results
from finetune_study.study import open_study
from tests.unit import handmade


def test_plan_counts_runs_by_reason(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["recipes"] = {"full": {}, "lora": {"lora": {}}, "flash": {"flash_attention_2": {}}, "tf32": {"tf32": {}}}
    raw["grid"][0] |= {"recipes": list(raw["recipes"]), "sequence_length": [32, 64, 128]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    results = Results(tmp_path / "results")
    found = {(one.run.recipe, one.run.sequence_length): one.run for one in open_study(raw, results).planned.values()}
    handmade.write(results.root, handmade.out_of_memory(found["full", 32]), handmade.completed(found["lora", 32], 1.0))
    answer = CliRunner().invoke(cli.app, ["plan", "-c", str(tmp_path / "config.yaml"), "-r", str(results.root)])
    assert answer.exit_code == 0, answer.output
    *counts, summary = answer.output.splitlines()[-6:]
    implied, measured, to_train, flash, tf32 = sorted(counts)
    assert (implied, measured, to_train) == ("2 implied out of memory", "2 measured", "2 to train")
    assert flash.startswith("3 unsupported: FlashAttention-2 has CUDA kernels alone")
    assert tf32.startswith("3 unsupported: transformers: --tf32 requires")
    assert summary == (
        "12 runs, 2 measured, 2 to train, 6 unsupported, 2 implied out of memory; "
        "no forecast yet (snakemake --cores all forecast)"
    )


def test_a_plan_that_goes_into_a_pipe_has_a_line_for_each_run(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["recipes"] = {"a-name-that-takes-room-" + "x" * 40: {}, "flash": {"flash_attention_2": {}}}
    raw["grid"][0]["recipes"] = [*raw["recipes"]]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    command = [sys.executable, "-m", "finetune_study.cli", "plan", "-c", str(tmp_path / "config.yaml")]
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = piped.stdout.splitlines()
    planned = open_study(raw, Results(tmp_path / "results")).planned
    for run_id, one in planned.items():
        (line,) = [line for line in lines if run_id in line]
        assert (one.unsupported or "to train") in line
        assert "+".join(one.run.parsed_techniques) in line


def test_several_files_are_one_study_and_the_page_says_how_to_name_it(raw: dict[str, Any], tmp_path: Path) -> None:
    """As with Snakemake's --configfile: mappings grow, of all else the last one counts."""
    first, second, results = tmp_path / "config.yaml", tmp_path / "my study.yaml", tmp_path / "out"
    first.write_text(yaml.safe_dump(raw), encoding="utf-8")
    second.write_text(yaml.safe_dump({"report": {"title": "Ours"}, "grid": raw["grid"][:1]}), encoding="utf-8")
    options = ["-c", str(first), "-c", str(second), "-r", str(results)]
    results.mkdir()
    answer = CliRunner().invoke(cli.app, ["report", *options])
    assert answer.exit_code == 0, answer.output
    merged = raw | {"report": {**raw.get("report", {}), "title": "Ours"}, "grid": raw["grid"][:1]}
    study = open_study(merged, Results(results), files=[str(first), str(second)])
    page = html.unescape(study.results.report.read_text(encoding="utf-8"))
    assert "<h1>Ours</h1>" in page
    assert study.results.report.stat().st_mtime > first.stat().st_mtime - 1, "it says when it was made"
    assert study.results.comparisons.stat().st_mtime < first.stat().st_mtime, "for Snakemake, which makes it again"
    assert study.options == f" -c {first} -c '{second}' -r {results}"
    run = next(iter(study.planned.values())).run
    handmade.write(results, handmade.completed(run, 1.0))
    CliRunner().invoke(cli.app, ["report", *options])
    page = html.unescape(study.results.report.read_text(encoding="utf-8"))
    assert f"finetune-study export {run.target} {run.hardware.name}{study.options}</pre>" in page
    assert open_study(raw, Results(Path("results"))).options == ""


def test_results_that_are_not_there_are_no_empty_study(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    for command in ("status", "summary", "report"):
        given = [command, "-c", str(tmp_path / "config.yaml"), "-r", str(tmp_path / "reslts")]
        done = CliRunner().invoke(cli.app, given)
        assert done.exit_code != 0
        assert "There are no such results" in str(done.exception or done.output)
    assert not (tmp_path / "reslts").exists()


def test_a_ledger_that_is_named_is_there(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    done = CliRunner().invoke(cli.app, ["status", "-c", str(tmp_path / "config.yaml"), "--ledger", "leger.jsonl"])
    assert done.exit_code != 0
    assert "There is no such ledger" in str(done.exception or done.output)
