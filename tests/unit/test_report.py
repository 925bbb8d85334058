import base64
import gzip
import html.parser
import itertools
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import polars as pl
import pytest

from finetune_study import claims, outcome, recommend, record, report, table
from finetune_study.config import Config
from finetune_study.errors import StudyError
from finetune_study.paths import Results
from finetune_study.record import Failure, Record
from finetune_study.report import costs, figures, grammar, page, pair, scaling, summary, tables, tradeoff
from finetune_study.report.answer import answer, longest
from finetune_study.states import STATES
from tests.unit import handmade

STUDY = handmade.study()
RUNS = handmade.runs(STUDY)
FULL, LORA = RUNS["full", 1], RUNS["lora", 1]
ALL_STATES = (
    "completed", "device_oom", "host_oom", "timeout", "unsupported", "implied_oom", "predicted_oom", "failed", "not_run"
)  # fmt: skip


class Text(html.parser.HTMLParser):
    """What a reader sees of a page, its tags, and the addresses it names."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self._hidden = 0
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden += tag in ("style", "script")
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def built(study: Config, root: Path, *documents: Record | Failure) -> str:
    results = handmade.write(root, *documents)
    report.build(study, handmade.frame(study, root), results)
    return results.report.read_text(encoding="utf-8")


def embedded_runs(page: str) -> dict[str, Any]:
    """What the page carries of its runs, as its script unpacks it."""
    found = re.search(r'<script type="application/octet-stream" id="data">([^<]*)</script>', page)
    assert found is not None
    document: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found[1])))
    return document


def column(runs: dict[str, Any], name: str) -> list[Any]:
    packed = runs["columns"][name]
    if "codes" in packed:
        return [None if code is None else packed["words"][code] for code in packed["codes"]]
    return list(packed["values"])


def mixed(study: Config = STUDY) -> list[Record | Failure]:
    runs = handmade.runs(study)
    return [handmade.completed(runs["lora", 1], 1.0, 1.1, 1.2, used=0.25), handmade.out_of_memory(runs["full", 1])]


def test_every_state_has_words_a_symbol_and_a_meaning() -> None:
    assert tuple(STATES) == (*record.STATUSES, "failed", "not_run") == ALL_STATES
    assert len({state.words for state in STATES.values()}) == len({s.symbol for s in STATES.values()}) == len(STATES)
    assert all(state.meaning for state in STATES.values())


def test_the_page_shows_every_run_with_its_numbers(tmp_path: Path) -> None:
    page = built(STUDY, tmp_path, *mixed())
    text = Text(page).text
    assert "The default should be lora for tiny on cpu × 1 at context 128 (too few data for a ranking)." in text
    runs = embedded_runs(page)
    assert column(runs, "run_id") == [FULL.run_id, LORA.run_id]
    assert column(runs, "state") == ["device_oom", "completed"]
    assert column(runs, "step_time_seconds_median") == [None, 1.1]
    assert column(runs, "step_time_seconds_samples") == [None, [1.0, 1.1, 1.2]]
    assert column(runs, "oom_requested_gib") == [0.0625, None]
    assert [one["name"] for one in runs["table"]][:3] == ["state", "target", "hardware"]
    assert json.loads(runs["settings"]["training"]["words"][0])["learning_rate"] == 4e-4


def test_repeats_of_one_recipe_with_differing_software_give_a_page_with_a_warning(tmp_path: Path) -> None:
    study = handmade.study(protocol={"num_untimed_steps": 1, "num_timed_steps": 3, "repeats": 2})
    runs = handmade.runs(study)
    documents = [
        handmade.completed(runs[recipe, number], 1.0, software=digest * 64)
        for recipe in ("full", "lora")
        for number, digest in ((1, "a"), (2, "b"))
    ]
    seen = Text(built(study, tmp_path, *documents)).text
    assert "Software, device, weights or data differ among runs of one setting." in seen
    assert "completed runs differ in software (" in seen
    contents = report.gather(study, handmade.frame(study, tmp_path))
    assert contents.costs == []
    for text in (summary.markdown(contents), summary.terminal(contents)):
        assert "not comparable" in text


def test_the_page_defines_every_column_status_and_verdict(tmp_path: Path) -> None:
    text = Text(built(STUDY, tmp_path)).text
    for name, (_, meaning) in (outcome.COLUMNS | table.COLUMNS).items():
        assert name in text
        assert meaning in text
    for state in STATES.values():
        assert state.meaning in text


def test_text_of_logs_and_names_is_shown_and_never_executed(tmp_path: Path) -> None:
    evil = '<script>alert("log")</script><img src=x onerror=alert(1)>'
    study = handmade.study(report={"title": f"Über 学習 {evil}"})
    late = handmade.unsupported(LORA, f"reason {evil}")
    page = built(study, tmp_path, handmade.failure(FULL, cause=f"cause {evil}", log_tail=f"tail {evil}"), late)
    seen = Text(page)
    assert seen.tags.count("script") == 2  # the page's own, and the data of its runs, which is no script
    assert "img" not in seen.tags
    for place in ("Über 学習", "cause", "tail"):
        assert f"{place} {evil}" in seen.text
    assert column(embedded_runs(page), "reason") == [None, f"reason {evil}"]
    assert "script-src 'sha256-" in page


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = built(STUDY, tmp_path, *mixed())
    addresses = Text(page).addresses
    assert {a for a in addresses if not a.startswith("#")} == {"tables/runs.csv", "tables/comparisons.csv", "figures/"}
    assert {a for a in addresses if a.startswith("#run=")} == {f"#run={run.run_id}" for run in (FULL, LORA)}
    anchors = {a[1:] for a in addresses if a.startswith("#") and not a.startswith("#run=")}
    assert anchors <= set(re.findall(r'id="([^"]+)"', page))
    assert "@import" not in page
    assert "url(http" not in page


def test_files_of_figures_and_tables(tmp_path: Path) -> None:
    stale = Results(tmp_path).figures / "memory_gone_cpux1.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("<svg/>")
    built(STUDY, tmp_path, *mixed())
    found = sorted(path.name for path in Results(tmp_path).figures.iterdir())
    names = ("feasibility_tiny_cpu", "models_cpu", "recipes_tiny_cpu")
    assert found == [f"{name}.{ending}" for name in names for ending in ("png", "svg")]
    assert (Results(tmp_path).figures / found[0]).read_bytes().startswith(b"\x89PNG")
    runs = pl.read_csv(tmp_path / "report" / "tables" / "runs.csv")
    assert runs["state"].to_list() == ["device_oom", "completed"]
    assert runs["step_time_seconds_samples"].to_list() == [None, "1.0;1.1;1.2"]
    written = {path.stem for path in (tmp_path / "report" / "tables").iterdir()}
    assert written == {"runs", "comparisons", "recommendations", "costs", "claims"}


@pytest.mark.parametrize("notice", [None, "Made up: <no> run & no GPU. " * 5])
def test_a_figures_file_has_a_title_and_the_notice_and_the_page_has_them_once(
    tmp_path: Path, notice: str | None
) -> None:
    page = built(handmade.study(report={"notice": notice}), tmp_path, *mixed())
    title = "Memory and time per recipe: tiny on cpu × 1, context 128"
    assert page.count(f">{title}<") == 1  # the caption's
    file = (Results(tmp_path).figures / "recipes_tiny_cpu.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(file)
    (inner,) = root.findall("{*}g[@transform]")
    top = float(inner.attrib["transform"].removeprefix("translate(0,").removesuffix(")"))
    texts = root.findall("{*}g/{*}text")
    said = " ".join(text.text or "" for text in texts)
    assert said == " ".join(filter(None, (title, (notice or "").strip())))
    assert max(float(text.attrib["y"]) for text in texts) < top
    in_the_page = next(svg for svg in re.findall(r"<svg[^>]*>", page) if f'width="{root.attrib["width"]}"' in svg)
    assert float(root.attrib["height"]) == top + grammar.size_of(in_the_page)[1]
    assert "#run=" not in file


@pytest.mark.parametrize("seconds", [0.0123, 0.9, 1.4, 2.8, 37.0, 999.0, 4000.0])
def test_no_label_of_the_axis_of_times_is_left_out(tmp_path: Path, seconds: float) -> None:
    """Vega makes a label that it leaves out transparent; none of them lies on another one."""
    documents = [handmade.completed(FULL, seconds), handmade.completed(LORA, seconds / 2)]
    root = ElementTree.fromstring(drawn(STUDY, tmp_path, *documents)["recipes"].svg())
    axes = [g for g in root.iter() if "role-axis-label" in g.get("class", "")]
    texts = [[(float(re.findall(r"[\d.]+", t.get("transform", ""))[0]), t) for t in axis_] for axis_ in axes]
    (of_times,) = [some for some in texts if some[0][1].text in ("0", "0.0", "0.00", "0.000") and some[-1][0] < 120]
    assert [text.get("opacity") for _, text in of_times] == ["1"] * len(of_times)
    assert len(of_times) in (2, 3)
    ends = [(x - half, x + half) for x, t in of_times for half in (grammar.width_of(t.text or "") / 2,)]
    assert all(right < left for (_, right), (left, _) in itertools.pairwise(ends))
    steps = [round(b[0] - a[0], 3) for a, b in itertools.pairwise(of_times)]
    assert len({*steps}) == 1


@pytest.mark.parametrize("gib", [0.3, 1.0, 2.6, 9.5, 24.0, 80.0, 141.0, 640.0])
def test_labels_of_memory_lie_apart(tmp_path: Path, gib: float) -> None:
    """Vega moves the first and the last label inwards, unless it is told not to: against the next one."""
    study = handmade.study(hardware={"cpu": {"device": "cpu", "memory_gib": gib}})
    every = handmade.runs(study)
    svg = drawn(study, tmp_path, *(handmade.out_of_memory(run) for run in every.values()))["recipes"].svg()
    axes = [g for g in ElementTree.fromstring(svg).iter() if "role-axis-label" in g.get("class", "")]
    (labels,) = [[*texts] for texts in axes if (texts[0].text or "").startswith("0")]
    places = [float(re.findall(r"[\d.]+", t.get("transform", ""))[0]) for t in labels]
    halves = [grammar.width_of(t.text or "") / 2 for t in labels]
    assert len(places) >= 2
    ends = [(place - half, place + half) for place, half in zip(places, halves, strict=True)]
    assert all(right + 4 < left for (_, right), (left, _) in itertools.pairwise(ends))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([9.6, 10.4], [9.6, 9.8, 10, 10.2, 10.4]),
        ([2.38, 3.99], [2.5, 3, 3.5, 4]),
        ([0.9831, 0.9874], [0.983, 0.984, 0.985, 0.986, 0.987]),
        ([1234.0, 1310.0], [1240, 1260, 1280, 1300]),
        ([5.0], [4, 5, 6]),
        ([2.41, 2.41000001], [2, 2.5, 3]),
        ([1.0, 90.0], [1, 2, 5, 10, 20, 50, 100]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_round(values: list[float], expected: list[float]) -> None:
    assert grammar.log_axis(grammar.log_scale(values), "")["axis"]["values"] == expected


def drawn(study: Config, root: Path, *documents: Record | Failure) -> dict[str, grammar.Figure]:
    compared = handmade.compared(study, root, *documents)
    pairs = pair.pairs(study, compared.to_dicts(), recommend.recommend(compared))
    return {figure.kind: figure for figure in figures.draw(pairs)}


def test_figures_say_in_words_what_has_no_number(tmp_path: Path) -> None:
    found = drawn(STUDY, tmp_path, *mixed())
    svg = found["recipes"].svg()
    assert "✕ out of memory" in svg
    assert "0.250 GiB" in svg
    assert "1.10 s" in svg
    assert found["recipes"].title == "Memory and time per recipe: tiny on cpu × 1, context 128"
    assert found["recipes"].caption == "Memory in use (peak_device_used_gib); dashed: the device's 1.00 GiB."


def test_a_cell_of_the_map_names_the_fastest_recipe_and_links_to_its_run(tmp_path: Path) -> None:
    (cell,) = drawn(STUDY, tmp_path, *mixed())["feasibility"].spec["datasets"]["cells"]
    assert (cell["context"], cell["gpus"], cell["first"], cell["second"]) == (128, 1, "? lora", "1.10 s, 0.250 GiB")
    assert (cell["tone"], cell["link"]) == ("good", f"#run={LORA.run_id}")
    name, *facts = cell["tip"].split("\n")
    assert name == "tiny, cpu × 1, context 128"
    assert facts == [
        "Recommended: lora",
        "Verdict: too few data",
        "Step time: 1.10 s (1 run)",
        "Memory: peak 0.250 GiB, of the device's 1.00 GiB",
        "Not compared: full (out of memory)",
        "To settle it: repeats: 3, in the grid or the protocol, adds runs of lora",
    ]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([["device_oom"]], ("device_oom", "")),
        ([["device_oom", "device_oom", "host_oom"]], ("device_oom", "2 ✕ 1 ⊠")),
        ([["device_oom", "device_oom"], ["not_run"]], ("not_run", "2 ✕ 1 ○")),
        ([["device_oom", "not_run", "failed"], ["unsupported", "not_run"]], ("device_oom", "1 ✕ 1 ⊘")),
        ([["completed", "device_oom"], ["host_oom", "failed"]], ("device_oom", "1 ✓ 1 ✕ 1 ⊠")),
        ([["completed", "completed"]], ("completed", "")),
        ([["unsupported"], ["failed"]], ("failed", "1 ⊘ 1 !")),
        ([["implied_oom"]], ("implied_oom", "")),
        ([["predicted_oom"]], ("predicted_oom", "")),
        ([["timeout"]], ("timeout", "")),
        ([["predicted_oom"], ["implied_oom"], ["implied_oom"], ["timeout"]], ("timeout", "1 ≫ 2 ⇒ 1 ◷")),
        ([["device_oom"], ["device_oom", "timeout"]], ("device_oom", "2 ✕ 1 ◷")),
        ([], ("not_run", "")),
    ],
)
def test_a_cell_in_which_nothing_fits_says_how_it_fails(states: list[list[str]], expected: tuple[str, str]) -> None:
    assert tables.how_it_failed(states) == expected


def test_a_study_of_one_model_shows_which_mix_it_needs(tmp_path: Path) -> None:
    """It may be a large one."""
    cells = drawn(STUDY, tmp_path, *mixed())["models"].spec["datasets"]["cells"]
    assert [(one["target"], one["recipe"], one["first"]) for one in cells] == [
        ("tiny", "full", "✕ out of memory"),
        ("tiny", "lora", "1.10 s"),
    ]


def test_a_cell_of_the_map_says_what_no_missing_run_can_change(tmp_path: Path) -> None:
    study = handmade.study(protocol={"num_untimed_steps": 1, "num_timed_steps": 3, "repeats": 2})
    runs = handmade.runs(study)
    ran_out = [handmade.out_of_memory(runs[recipe, 1]) for recipe in ("full", "lora")]
    done = handmade.completed(runs["lora", 2], 1.0)
    kinds = [handmade.completed(runs["lora", n], 1.0, software=digest * 64) for n, digest in ((1, "a"), (2, "b"))]
    for name, documents, expected in (
        ("out of memory", ran_out, ("✕ out of memory", "memory", "")),
        ("open", ran_out[:1], ("○ not run", "none", "1 ✕ 2 ○")),
        ("contradictory", [*ran_out, done], ("? contradictory", "none", "2 ✕ 1 ✓")),
        ("mixed", [ran_out[0], *kinds], ("? not comparable", "none", "1 ✕ 2 ✓")),
    ):
        (cell,) = drawn(study, tmp_path / name, *documents)["feasibility"].spec["datasets"]["cells"]
        assert (cell["first"], cell["tone"], cell["second"]) == expected, name


def test_hovering_over_the_map_tells_memory_and_limit_in_numbers(tmp_path: Path) -> None:
    (cell,) = drawn(STUDY, tmp_path / "fits", *mixed())["feasibility"].spec["datasets"]["cells"]
    assert "Memory: peak 0.250 GiB, of the device's 1.00 GiB" in cell["tip"].split("\n")
    paths = Results(tmp_path / "none").run(LORA.run_id)
    paths.folder.mkdir(parents=True)
    paths.prior.write_text(json.dumps({"predicted_peak_memory_allocated_gib": 3.5}))
    skipped = Record(run=LORA, ending=record.Ending(status="predicted_oom"))
    (cell,) = drawn(STUDY, tmp_path / "none", handmade.out_of_memory(FULL), skipped)["feasibility"].spec["datasets"][
        "cells"
    ]
    assert cell["tip"].split("\n")[1:] == [
        "Verdict: nothing fits",
        "full: out of memory; 64.0 MiB asked for, 0.879 GiB held, of the device's 1.00 GiB",
        "lora: predicted out of memory; 3.50 GiB predicted, of the device's 1.00 GiB",
    ]
    assert "_oom" not in cell["tip"]


def test_the_pareto_front_by_hand() -> None:
    rows: list[dict[str, Any]] = [
        {"recipe": name, "step_time_seconds_median": time, "peak_memory_gib_median": memory, "provenance": ["a"]}
        for name, time, memory in (("a", 1.0, 9.0), ("b", 2.0, 5.0), ("c", 3.0, 6.0), ("d", 4.0, 1.0), ("e", None, 1.0))
    ]
    assert [row["recipe"] for row in tradeoff.pareto_front(rows)] == ["a", "b", "d"]
    rows[2]["provenance"] = ["b"]
    assert tradeoff.pareto_front(rows) == []


def test_the_exponent_of_a_power_law() -> None:
    assert scaling.exponent([(x, 3 * x**1.5) for x in (256, 512, 1024)]) == pytest.approx(1.5)
    assert scaling.exponent([(256, 1.0), (512, 2.0)]) is None


def test_a_figure_on_the_page_takes_the_pages_colours(tmp_path: Path) -> None:
    inline = page.for_page(drawn(STUDY, tmp_path, *mixed())["recipes"].svg())
    assert "var(--share1)" in inline
    for colour in (grammar.INK, grammar.MUTED, grammar.LINE, grammar.BAR, grammar.MEMORY, grammar.PAPER):
        assert colour not in inline


@pytest.mark.parametrize(
    ("states", "value", "expected"),
    [
        (["completed"], 1.0, "1.00 s"),
        (["device_oom"], None, "✕ out of memory"),
        (["predicted_oom"], None, "≫ predicted out of memory"),
        (["unsupported"] * 3, None, "⊘ unsupported"),
        (["completed", "completed", "device_oom"], 1.0, "1.00 s, ✕ 1 of 3 out of memory"),
        (["failed", "not_run"], None, "! 1 of 2 failed, ○ 1 of 2 not run"),
        (["timeout"], None, "◷ timeout"),
    ],
)
def test_labels_of_a_figure(states: list[str], value: float | None, expected: str) -> None:
    assert grammar.label(ended(states), value, "s") == expected


@pytest.mark.parametrize(
    ("states", "value", "expected"),
    [
        (["completed", "device_oom", "device_oom"], 1.0, "1.00 s 2 ✕"),
        (["device_oom"] * 3, None, "✕ out of memory"),
        (["device_oom", "device_oom", "failed"], None, "2 ✕ 1 !"),
        (["completed", "failed"], None, "not shown: no timed step, ! 1 of 2 failed"),
    ],
)
def test_a_label_with_little_room_counts_states_by_their_symbols(
    states: list[str], value: float | None, expected: str
) -> None:
    assert grammar.brief(ended(states), value, "s") == expected


def ended(states: list[str]) -> dict[str, Any]:
    return {"states": states, "num_completed": states.count("completed"), "not_compared": None}


def test_differing_devices_are_warned_of(tmp_path: Path) -> None:
    records = [handmade.completed(FULL, 2.0), handmade.completed(LORA, 1.0, device="Another CPU @ 3.0GHz")]
    text = Text(built(STUDY, tmp_path, *records)).text
    assert "completed runs differ in device ( Some CPU @ 2.5GHz , Another CPU @ 3.0GHz )" in text
    assert "not comparable" in text


def test_differing_software_is_warned_of(tmp_path: Path) -> None:
    records = [handmade.completed(FULL, 2.0), handmade.completed(LORA, 1.0, software="b" * 64)]
    text = Text(built(STUDY, tmp_path, *records)).text
    assert "Software, device, weights or data differ among runs of one setting." in text
    assert "completed runs differ in software ( aaaaaaaaaaaa , bbbbbbbbbbbb )" in text
    assert "software, device, weights, data or effective batch differ from the baseline's" in text
    assert "not comparable" in text


@pytest.mark.parametrize("differs", [{"software": "b" * 64}, {"lock": "f" * 64}], ids=["versions", "lock"])
def test_hardware_with_software_of_its_own_is_warned_of(tmp_path: Path, differs: dict[str, Any]) -> None:
    """Nothing is compared between hardware entries, but a reader does."""
    block = {"targets": "tiny", "hardware": ["a100", "v100"], "recipes": "full", "sequence_length": 128}
    gpus = {"a100": {"memory_gib": 80}, "v100": {"memory_gib": 32}}
    study = handmade.study(hardware=gpus, grid=[block])
    a100, v100 = (planned.run for planned in handmade.planned(study))
    text = Text(built(study, tmp_path, handmade.completed(a100, 1.0), handmade.completed(v100, 2.0, **differs))).text
    assert "The runs were measured with 2 sets of software." in text
    assert "a100: versions aaaaaaaaaaaa , lock eeeeeeeeeeee ; v100:" in text
    assert "differ among runs" not in text


def test_no_warning_where_software_is_the_same(tmp_path: Path) -> None:
    page_text = built(STUDY, tmp_path, *mixed())
    assert "differ among runs" not in page_text
    assert "sets of software" not in page_text


def test_an_empty_study_gives_a_page(tmp_path: Path) -> None:
    report.build(STUDY, handmade.frame(STUDY, tmp_path).clear(), Results(tmp_path))
    text = Text((tmp_path / "report" / "index.html").read_text()).text
    assert "The study has no runs" in text
    assert "No run is planned." in text


def test_a_study_before_its_first_run_gives_a_page(tmp_path: Path) -> None:
    text = Text(built(STUDY, tmp_path)).text
    assert "2 runs 2 ○ not run" in text
    assert "No recipe can be recommended yet for tiny on cpu (nothing is known to fit yet)" in text


def test_all_runs_out_of_memory_gives_a_page(tmp_path: Path) -> None:
    text = Text(built(STUDY, tmp_path, handmade.out_of_memory(FULL), handmade.out_of_memory(LORA))).text
    assert "2 runs 2 ✕ out of memory" in text
    assert "No recipe can be recommended yet for tiny on cpu (nothing that was planned fits)" in text
    assert "Nothing fits: full (out of memory), lora (out of memory)." in text


def test_one_run_gives_a_page(tmp_path: Path) -> None:
    study = handmade.study(
        grid=[{"targets": "tiny", "hardware": "cpu", "recipes": "full", "sequence_length": 128}],
    )
    text = Text(built(study, tmp_path, handmade.completed(handmade.runs(study)["full", 1], 2.0))).text
    assert "The default should be full for tiny on cpu × 1 at context 128 (too few data for a ranking)." in text


def test_a_gpu_study_shows_allocated_and_reserved_memory(tmp_path: Path) -> None:
    gpu = handmade.study(
        hardware={"a100": {"gpu": "NVIDIA A100-SXM4-80GB", "memory_gib": 80, "compute_capability": 8.0}},
        grid=[{"targets": "tiny", "hardware": "a100", "recipes": ["full"], "sequence_length": 128}],
    )
    done = handmade.completed(handmade.runs(gpu)["full", 1], 1.0)
    done.ranks[0]["memory"] = {"peak_allocated_bytes": 3 * 2**30, "peak_reserved_bytes": 5 * 2**30}
    runs = embedded_runs(built(gpu, tmp_path, done))
    titles = [one["title"] for one in runs["table"]]
    assert "Peak allocated" in titles
    assert "Peak device memory" not in titles
    assert (column(runs, "peak_memory_allocated_gib"), column(runs, "peak_memory_reserved_gib")) == ([3.0], [5.0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"state": "completed", "num_skipped_steps": 4}, "4 steps skipped by loss scaling"),
        ({"state": "completed", "num_skipped_steps": 0}, ""),
        ({"state": "unsupported", "reason": "no bf16"}, "no bf16"),
        ({"state": "timeout", "reason": "30 minutes are over.", "num_timed_steps": 2},
         "30 minutes are over. 2 timed steps are kept."),
        ({"state": "failed", "failure_cause": "lost node", "attempts": 3}, "lost node (3 tries)"),
        ({"state": "not_run"}, ""),
        ({"state": "device_oom", "reason": "nobody knows"}, "nobody knows"),
        ({"state": "device_oom", "oom_phase": "forward", "oom_rank": 1, "num_gpus": 2, "oom_requested_gib": 2.0,
          "oom_fragmented": True},
         "in forward, rank 1; 2.00 GiB asked for; fragmented: more was free than was asked for"),
    ],
)  # fmt: skip
def test_what_happened(changes: dict[str, Any], expected: str) -> None:
    assert tables.what_happened(dict.fromkeys(outcome.COLUMNS) | {"attempts": 1} | changes) == expected


def test_the_summary_for_the_terminal(tmp_path: Path) -> None:
    study = handmade.study(recipes={"full": [], "lora": ["lora"], "late": ["eager"]}, grid=[
        {"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora", "late"], "sequence_length": 128}
    ])  # fmt: skip
    frame = handmade.frame(study, tmp_path, *mixed(study))
    lines = tables.summary_text(frame, width=80).splitlines()
    digests = [run_id.rpartition("-")[2] for run_id in frame["run_id"]]
    assert lines == [
        " run                                 status       step time   peak memory",
        " ────────────────────────────────────────────────────────────────────────",
        f" tiny_cpux1_s128_b1_full_r1-{digests[0]}   device_oom",
        f" tiny_cpux1_s128_b1_lora_r1-{digests[1]}   completed       1.10 s     0.250 GiB",
        f" tiny_cpux1_s128_b1_late_r1-{digests[2]}   not_run",
        "",
        "3 runs: 1 completed, 1 out of memory, 1 not run",
    ]


def test_the_summary_has_predictions_only_where_there_is_one(tmp_path: Path) -> None:
    documents = mixed()
    assert "predicted" not in tables.summary_text(handmade.frame(STUDY, tmp_path, *documents))
    Results(tmp_path).run(LORA.run_id).prior.write_text('{"predicted_peak_memory_allocated_gib": 0.3}')
    text = tables.summary_text(handmade.frame(STUDY, tmp_path))
    assert text.count("predicted") == 1, "no step time was predicted"
    assert "0.300 (+20.0 %)" in text


def test_texts_show_predictions_with_their_errors_and_the_mean_of_these(tmp_path: Path) -> None:
    done = [handmade.completed(FULL, 2.0, used=0.5), handmade.completed(LORA, 1.0, used=0.25)]
    for run, gib in ((FULL, 0.6), (LORA, 0.2)):
        prior = Results(tmp_path).run(run.run_id).prior
        prior.parent.mkdir(parents=True)
        prior.write_text(f'{{"predicted_peak_memory_allocated_gib": {gib}, "predicted_step_time_seconds": 1.1}}')
    frame = handmade.frame(STUDY, tmp_path, *done)
    contents = report.gather(STUDY, frame)
    mean = (
        "Mean absolute error of what was predicted before the runs: peak memory 20.0 % over 2 runs and step time 27.5 %"
    )
    for text in (summary.markdown(contents), summary.terminal(contents, 200)):
        assert "1.10 (+10.0 %)" in text
        assert "0.200 (-20.0 %)" in text
        assert mean in text
    lines = tables.summary_text(frame).splitlines()
    assert lines[0].split() == ["run", "status", "step", "time", "predicted", "peak", "memory", "predicted"]
    assert lines[2].endswith("completed      2.00 s   1.10 (-45.0 %)     0.500 GiB   0.600 (+20.0 %)")


def test_nothing_is_said_of_predictions_where_none_was_made(tmp_path: Path) -> None:
    contents = report.gather(STUDY, handmade.frame(STUDY, tmp_path, *mixed()))
    assert "predicted" not in summary.markdown(contents) + summary.terminal(contents)


def test_the_summary_of_an_empty_study(tmp_path: Path) -> None:
    assert tables.summary_text(handmade.frame(STUDY, tmp_path).clear()) == "no runs\n"


BLOCK = {"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora"], "sequence_length": 128}


def over_nodes(*places: tuple[int, int], root: Path) -> tuple[str, report.page.Contents]:
    """The page of a study whose runs are on these numbers of devices and nodes; seconds name the nodes."""
    study = handmade.study(grid=[BLOCK | {"num_gpus": num_gpus, "nodes": nodes} for num_gpus, nodes in places])
    documents = [handmade.completed(p.run, float(p.run.nodes)) for p in handmade.planned(study)]
    page = built(study, root, *documents)
    return page, report.gather(study, handmade.frame(study, root))


def test_nodes_are_named_where_there_are_several(tmp_path: Path) -> None:
    page, contents = over_nodes((2, 1), (2, 2), root=tmp_path)
    text = Text(page).text
    assert "cpu × 2 on 2 nodes, context 128" in text
    assert "cpu × 2, context 128" in text
    assert "nodes" in [one["name"] for one in embedded_runs(page)["table"]]
    assert embedded_runs(page)["filters"].count("nodes") == 1
    kinds = {figure.kind: figure for figure in figures.draw(contents.pairs)}
    rows = kinds["feasibility"].spec["datasets"]["cells"]
    assert [(one["gpus"], one["second"].partition(",")[0]) for one in rows] == [
        (2, "1.00 s"),
        ("2 on 2 nodes", "2.00 s"),
    ]
    marks = kinds["recipes"].spec["datasets"]["marks"]  # as many devices: on the fewer nodes
    assert [(one["recipe"], one["time"]) for one in marks] == [("full", 1.0), ("lora", 1.0)]
    assert "on 2 nodes" not in kinds["recipes"].title
    (cost,) = contents.costs
    assert (cost["num_gpus"], cost["nodes"], cost["choice"]) == (2, 1, "the default")
    (walk,) = contents.walks
    assert (walk.num_gpus, walk.nodes) == (2, 1)


@pytest.mark.parametrize("digest", ["a", "b"])
def test_the_fewest_gpu_hours_are_not_named_across_software(tmp_path: Path, digest: str) -> None:
    """One device is cheaper than the default's two; with other software it is not compared, nor is the micro-batch."""
    study = handmade.study(grid=[BLOCK | {"num_gpus": 2}, BLOCK | {"num_gpus": 1}])
    documents = [
        handmade.completed(p.run, 1.0, software=("a" if p.run.num_gpus == 2 else digest) * 64)
        for p in handmade.planned(study)
    ]
    contents = report.gather(study, handmade.frame(study, tmp_path, *documents))
    assert [one["choice"] for one in contents.costs] == ["the default", "fewest GPU-hours"][: 2 if digest == "a" else 1]


def test_the_fewest_gpu_hours_are_of_what_is_recommended_there(tmp_path: Path) -> None:
    """On one device full is a little cheaper; but lora is what the tie there names."""
    study = handmade.study(grid=[BLOCK | {"num_gpus": [1, 2]}], training=FOUR)
    seconds = {("lora", 2): 3.0, ("full", 2): 3.1, ("lora", 1): 1.01, ("full", 1): 1.0}
    documents = [handmade.completed(p.run, seconds[p.run.recipe, p.run.num_gpus]) for p in handmade.planned(study)]
    compared = handmade.compared(study, tmp_path, *documents)
    every = [one.model_copy(update={"recipe": "lora"}) for one in recommend.recommend(compared)]
    found = costs.costs(study, recommend.defaults(every), every, compared.to_dicts())
    assert [(one["choice"], one["recipe"], one["num_gpus"]) for one in found] == [
        ("the default", "lora", 2), ("fewest GPU-hours", "lora", 1),
    ]  # fmt: skip


def test_a_table_that_is_cut_has_some_of_each_model() -> None:
    rows = [claims.Comparison(str(n), "", None, target="b" if n >= 8 else "a", hardware="cpu") for n in range(10)]
    assert [one.where for one in page.of_each_pair(rows, most=5)] == ["0", "1", "2", "8", "9"]
    assert page.of_each_pair(rows, most=10) == rows


def test_what_the_study_took_counts_the_last_try_of_failed_runs_too(tmp_path: Path) -> None:
    failed = handmade.failure(FULL).model_copy(update={"duration_seconds": 324.0})
    frame = handmade.frame(STUDY, tmp_path, failed, handmade.completed(LORA, 1.0))  # 36 s on one device
    assert costs.spent(frame) == "0.100 GPU-hours"


def test_figures_do_not_choose_between_micro_batches_of_differing_software(tmp_path: Path) -> None:
    study = handmade.study(grid=[BLOCK | {"per_device_train_batch_size": [1, 2]}])
    for root, digest, expected in ((tmp_path / "a", "a", "2"), (tmp_path / "b", "b", "1")):
        documents = [
            handmade.completed(
                p.run, 3.0 - int(p.run.micro_batch), software=("a" if p.run.micro_batch == 1 else digest) * 64
            )
            for p in handmade.planned(study)
        ]
        (one,) = report.gather(study, handmade.frame(study, root, *documents)).pairs
        assert {row["micro_batch"] for row in one.best_rows()} == {expected}


def test_the_most_devices_may_be_on_several_nodes(tmp_path: Path) -> None:
    page, contents = over_nodes((1, 1), (2, 1), (4, 2), root=tmp_path)
    kinds = {figure.kind: figure for figure in figures.draw(contents.pairs)}
    assert "cpu × 4 on 2 nodes, context 128" in kinds["recipes"].title
    times = kinds["gpus"].spec["datasets"]["time"]
    assert {(one["recipe"], one["x"]) for one in times} == {
        ("full", 1), ("full", 2), ("full on 2 nodes", 4), ("lora", 1), ("lora", 2), ("lora on 2 nodes", 4),
    }  # fmt: skip
    assert "full, cpu × 4 on 2 nodes, context 128" in times[-1]["tip"] + times[-2]["tip"]
    summary = Results(tmp_path).summary.read_text(encoding="utf-8")
    assert "tiny on cpu × 4 on 2 nodes, context 128" in summary
    assert "<b>tiny</b> on cpu × 4 on 2 nodes" in page


def test_a_run_on_several_nodes_is_repeated_on_several(tmp_path: Path) -> None:
    page, _ = over_nodes((2, 1), (2, 2), root=tmp_path)
    alone, together = sorted({*column(embedded_runs(page), "command")}, key=len)
    assert alone == f"python -m finetune_study.launch {tmp_path}/runs/RUN_ID/run.yaml"
    assert together == f"srun --nodes=2 --ntasks=2 --ntasks-per-node=1 {alone}"


def test_nothing_speaks_of_nodes_where_each_run_is_on_one(tmp_path: Path) -> None:
    page, contents = over_nodes((1, 1), (2, 1), root=tmp_path)
    assert not re.search(r"on \d+ nodes", page.partition("<script")[0])
    assert "nodes" not in [one["name"] for one in embedded_runs(page)["table"]]
    assert {one["gpus"] for one in figures.draw(contents.pairs)[0].spec["datasets"]["cells"]} == {1, 2}


def test_predictions_stand_beside_what_was_measured(tmp_path: Path) -> None:
    runs = handmade.runs(STUDY)
    prior = {"predicted_peak_memory_allocated_gib": 0.6, "predicted_step_time_seconds": 2.5}
    for run in runs.values():
        paths = Results(tmp_path).run(run.run_id)
        paths.folder.mkdir(parents=True)
        paths.prior.write_text(json.dumps(prior))
    page = built(STUDY, tmp_path, *(handmade.completed(run, 2.0, used=0.5) for run in runs.values()))
    found = embedded_runs(page)
    assert {
        "predicted_step_time_seconds", "predicted_step_time_error_percent",
        "predicted_peak_memory_allocated_gib", "predicted_memory_error_percent",
    } <= {one["name"] for one in found["table"]}  # fmt: skip
    assert column(found, "predicted_memory_error_percent") == pytest.approx([20.0, 20.0])
    assert column(found, "predicted_step_time_error_percent") == pytest.approx([25.0, 25.0])
    assert "predicted 2.50" in Text(page).text
    assert "predicted 0.600" in Text(page).text
    pairs = report.gather(STUDY, handmade.frame(STUDY, tmp_path)).pairs
    (recipes,) = (one for one in figures.draw(pairs) if one.kind == "recipes")
    assert {(m["predicted_memory"], m["predicted_time"]) for m in recipes.spec["datasets"]["marks"]} == {(0.6, 2.5)}
    assert "Predicted: 2.50 s, 0.600 GiB" in recipes.spec["datasets"]["marks"][0]["tip"]


def test_a_prediction_of_what_never_ran_does_not_stretch_the_axis(tmp_path: Path) -> None:
    runs = handmade.runs(STUDY)
    for name, seconds in (("full", 100.0), ("lora", 1.5)):
        paths = Results(tmp_path).run(runs[name, 1].run_id)
        paths.folder.mkdir(parents=True)
        paths.prior.write_text(json.dumps({"predicted_step_time_seconds": seconds}))
    found = drawn(STUDY, tmp_path, handmade.out_of_memory(runs["full", 1]), handmade.completed(runs["lora", 1], 1.0))
    marks = {mark["recipe"]: mark for mark in found["recipes"].spec["datasets"]["marks"]}
    assert (marks["full"]["predicted_time"], marks["lora"]["predicted_time"]) == (None, 1.5)
    assert "Predicted: 100 s" in marks["full"]["tip"]


@pytest.mark.parametrize("status", ["implied_oom", "predicted_oom"])
def test_runs_without_training_stand_in_map_and_tables(tmp_path: Path, status: Any) -> None:
    ending = record.Ending(status=status, reason="because of an easier run")
    documents = [Record(run=run, ending=ending) for run in handmade.runs(STUDY).values()]
    page = built(STUDY, tmp_path, *documents)
    (cell,) = drawn(STUDY, tmp_path)["feasibility"].spec["datasets"]["cells"]
    assert cell["first"] == f"{STATES[status].symbol} {STATES[status].words}"
    assert cell["tone"] == "memory"
    assert column(embedded_runs(page), "state") == [status, status]
    assert column(embedded_runs(page), "reason") == ["because of an easier run"] * 2
    (mark, _) = drawn(STUDY, tmp_path)["recipes"].spec["datasets"]["marks"]
    assert mark["ran_out"] == 1.0
    assert STATES[status].words in mark["memory_label"]


def test_the_figures_of_any_pair_can_be_drawn(tmp_path: Path) -> None:
    frame = handmade.frame(STUDY, tmp_path, *mixed())
    files = report.draw_pair(STUDY, frame, "tiny", "cpu", tmp_path / "figures")
    assert sorted(path.name for path in files) == sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert "feasibility_tiny_cpu.svg" in [path.name for path in files]
    with pytest.raises(StudyError, match="tiny on cpu"):
        report.draw_pair(STUDY, frame, "tiny", "a100", tmp_path / "figures")


def test_where_the_default_does_not_fit_is_folded_for_each_pair(tmp_path: Path) -> None:
    """At 128 both fit and full is faster; at 256 lora alone does, at 512 and 1024 nothing."""
    block = {
        "targets": "tiny",
        "hardware": "cpu",
        "recipes": ["full", "lora"],
        "sequence_length": [128, 256, 512, 1024],
    }
    study = handmade.study(grid=[block])
    documents: list[Record | Failure] = []
    for run in (one.run for one in handmade.planned(study)):
        fits = run.sequence_length == 128 or (run.sequence_length == 256 and run.recipe == "lora")
        seconds = 1.0 if run.recipe == "full" else 2.0
        documents.append(handmade.completed(run, seconds) if fits else handmade.out_of_memory(run))
    text = Text(built(study, tmp_path, *documents)).text
    assert "tiny on cpu : full does not fit in 3 of 4 settings; there lora does in 1" in text
    assert "nothing fits × 1, context 512, 1024" in text
    assert "finetune-study export tiny cpu --num-gpus N --sequence-length N" in text


def test_the_answer_names_the_longest_context_that_is_known_to_fit(tmp_path: Path) -> None:
    """Per pair of model and hardware, wherever it fits, on the fewest GPUs of those; nothing fits the last one."""
    names = [f"tiny-{number}" for number in range(1, 7)]
    block = {
        "targets": names,
        "hardware": "cpu",
        "recipes": ["full", "lora"],
        "num_gpus": [1, 2, 4],
        "sequence_length": [128, 256, 512],
    }
    study = handmade.study(models=dict.fromkeys(names, handmade.LLAMA), grid=[block], training=FOUR)
    documents: list[Record | Failure] = []
    for run in (one.run for one in handmade.planned(study)):
        fits = run.target != names[-1] and (
            run.sequence_length == 128
            or (run.sequence_length == 256 and run.num_gpus > 1 and run.recipe == "lora" and run.target != names[0])
        )
        documents.append(handmade.completed(run, 1.0) if fits else handmade.out_of_memory(run))
    recommendations, defaults = said(study, tmp_path, *documents)
    sentences = answer(recommendations, defaults)
    assert [sentence.text.count(". ") for sentence in sentences] == [0, 0, 0], "three sentences"
    (_, beyond, cost) = sentences
    assert beyond.support.startswith(
        "The longest context that is known to fit is 256 for tiny-2, tiny-3, tiny-4 and tiny-5 on cpu; 128 for tiny-1 "
        "on cpu. Nothing that was planned fits in "
    )
    found = {target: (one.at.num_gpus, one.recipe) for (target, _), one in longest(recommendations).items()}
    assert found == {"tiny-1": (1, "full"), **dict.fromkeys(names[1:-1], (2, "lora"))}
    two = [one for one in recommendations if one.target in names[:2]]
    assert answer(two, defaults[:2])[1].support.startswith(
        "The longest context that is known to fit is 128 for tiny-1 on cpu × 1 (full); 256 for tiny-2 on cpu × 2 "
        "(lora)."
    )
    assert cost.text.startswith("With the default, an epoch, one pass over the training data, costs ")
    short = [one for one in recommendations if one.sequence_length < 512]
    assert answer(short, defaults)[1].support.startswith(
        "The longest context that is known to fit is 256 (the longest tried) for tiny-2, tiny-3, tiny-4 and tiny-5 on "
        "cpu; 128 for tiny-1 on cpu."
    )
    waiting = [d for d in documents if isinstance(d, Record) and d.run.sequence_length < 512]
    assert all(
        one.none_longer_tried is (target != "tiny-1")
        for (target, _), one in longest(said(study, tmp_path / "waiting", *waiting)[0]).items()
    )
    (_, beyond, _) = answer(
        *said(study, tmp_path / "none", *(handmade.out_of_memory(d.run) for d in handmade.planned(study)))
    )
    assert "longest context" not in beyond.support


def test_where_settings_alone_differ_the_recipe_that_fits_is_named(tmp_path: Path) -> None:
    """Both have the same techniques: there is nothing to add, and still another recipe fits."""
    recipes: dict[str, Any] = {
        name: {"lora": {}, "gradient_checkpointing": settings}
        for name, settings in (("every-4", {"every": 4}), ("every", {}))
    }
    block = {"targets": "tiny", "hardware": "cpu", "recipes": [*recipes], "sequence_length": [128, 512]}
    study = handmade.study(recipes=recipes, grid=[block])
    documents: list[Record | Failure] = [
        handmade.out_of_memory(run)
        if (run.recipe, run.sequence_length) == ("every-4", 512)
        else handmade.completed(run, 1.0 if run.recipe == "every-4" else 2.0)
        for run in (one.run for one in handmade.planned(study))
    ]
    (_, beyond, _) = answer(*said(study, tmp_path, *documents))
    assert beyond.text == (
        "Where a default does not fit (1 of 2 settings of context and GPUs), another recipe does: every."
    )


def test_the_answer_for_many_pairs_names_them_together_and_counts_how_sure_it_is(tmp_path: Path) -> None:
    """Whatever the answer leaves out, the table below it says of each pair."""
    entry = {"device": "cpu", "memory_gib": 1.0}
    block = {"targets": ["tiny", "small"], "hardware": ["old", "new"], "recipes": ["full", "lora"]}
    study = handmade.study(
        models={"tiny": handmade.LLAMA, "small": handmade.LLAMA},
        hardware={"old": entry, "new": entry},
        grid=[block | {"sequence_length": 128}],
    )
    seconds = {("small", "new"): {"full": 1.0, "lora": 2.0}}
    documents = [
        handmade.out_of_memory(run)
        if (run.target, run.hardware.name) == ("small", "old")
        else handmade.completed(
            run, seconds.get((run.target, run.hardware.name), {"full": 2.0, "lora": 1.0})[run.recipe]
        )
        for run in (one.run for one in handmade.planned(study))
    ]
    (first, _, _) = answer(*said(study, tmp_path, *documents))
    assert first == (
        "The default should be lora for tiny on old and new (both too few data for a ranking); full for small on new "
        "(too few data for a ranking); none can be named for small on old (nothing that was planned fits).",
        "It is the fastest that fits at the shortest context, on the most GPUs.",
    )
    text = " ".join(Text(built(study, tmp_path, *documents)).text.split())
    assert "tiny on old × 1 context 128 lora too few data" in text


def test_the_answer_for_a_lot_of_pairs_says_how_many_each_recipe_is_the_default_of(tmp_path: Path) -> None:
    models = {f"model-{number}": handmade.LLAMA for number in range(12)}
    block = {"targets": [*models], "hardware": "cpu", "recipes": ["full", "lora"], "sequence_length": 128}
    study = handmade.study(models=models, grid=[block])
    fast = {"model-3": "full"}
    documents = [
        handmade.completed(run, 1.0 if run.recipe == fast.get(run.target, "lora") else 2.0)
        for run in (one.run for one in handmade.planned(study))
    ]
    (first, beyond, _) = answer(*said(study, tmp_path, *documents))
    assert first.text == (
        "The default should be lora for 11 pairs of model and hardware (all too few data for a ranking); full for "
        "model-3 on cpu (too few data for a ranking)."
    )
    assert beyond.support == "The longest context that is known to fit is 128 (the longest tried) for 12 pairs."


FOUR = {"effective_batch_size": 4}


def said(study: Config, root: Path, *documents: Record | Failure) -> tuple[Any, Any]:
    contents = report.gather(study, handmade.frame(study, root, *documents))
    return contents.recommendations, contents.defaults


def test_points_that_failed_stand_above_in_a_row_for_each_recipe(tmp_path: Path) -> None:
    block = {
        "targets": "tiny",
        "hardware": "cpu",
        "recipes": ["full", "lora"],
        "sequence_length": [128, 256, 512, 1024],
    }
    study = handmade.study(grid=[block])
    documents: list[Record | Failure] = []
    for run in (one.run for one in handmade.planned(study)):
        fits = run.sequence_length <= (256 if run.recipe == "full" else 512)
        done = handmade.completed(run, run.sequence_length / 128)
        documents.append(done if fits else handmade.out_of_memory(run))
    figure = drawn(study, tmp_path, *documents)["context"]
    memory = figure.spec["datasets"]["memory"]
    failed = {(one["recipe"], one["x"]): one["y"] for one in memory if one["failed"]}
    assert {*failed} == {("full", 512), ("full", 1024), ("lora", 1024)}
    assert failed["full", 512] == failed["full", 1024] > 1.0  # GiB of the device
    assert {one["failed"] for one in memory if one["x"] == 1024} == {"✕"}
    assert {(one["x"], one["before"]) for one in memory if "before" in one} == {(512, "full"), (1024, "lora")}
    assert failed["lora", 1024] > failed["full", 1024]
    assert {one["series"] for one in memory} == {"full", "lora (0.00, 1.00)"}


def test_a_failure_above_the_lines_stands_as_the_symbol_of_its_state_beside_its_name(tmp_path: Path) -> None:
    """A name stands behind its row where there is no room before it, and nowhere without any."""
    names = ["short", "first-of-all", "a-name-that-is-much-longer-than-there-is-any-room-for"]
    recipes = {name: {"lora": {"r": number + 1}} for number, name in enumerate(names)}
    block = {"targets": "tiny", "hardware": "cpu", "recipes": names, "sequence_length": [128, 256, 512]}
    study = handmade.study(recipes=recipes, grid=[block])
    endings = {("short", 512): "timeout", ("first-of-all", 128): "host_oom", (names[2], 512): "device_oom"}
    documents: list[Record | Failure] = []
    for run in (one.run for one in handmade.planned(study)):
        status: Any = endings.get((run.recipe, run.sequence_length))
        ended = Record(run=run, ending=record.Ending(status=status)) if status else handmade.completed(run, 1.0)
        documents.append(ended)
    figure = drawn(study, tmp_path, *documents)["context"]
    found = [one for one in figure.spec["datasets"]["memory"] if one["failed"]]
    assert {(one["recipe"], one["failed"], one.get("before"), one.get("behind")) for one in found} == {
        ("short", STATES["timeout"].symbol, "short", None),
        ("first-of-all", STATES["host_oom"].symbol, None, "first-of-all"),
        (names[2], STATES["device_oom"].symbol, None, None),
    }
    svg = figure.svg()
    assert f">{STATES['timeout'].symbol}<" in svg
    assert ">first-of-all<" in svg


def test_every_recipe_with_an_outcome_is_drawn_in_figures_of_eight_lines_with_the_same_axes(tmp_path: Path) -> None:
    names = [f"lora-{rank}" for rank in range(1, 14)]
    recipes = {name: {"lora": {"r": int(name[5:])}} for name in names}
    block = {"targets": "tiny", "hardware": "cpu", "recipes": names, "sequence_length": [128, 256]}
    study = handmade.study(recipes=recipes, grid=[block])
    nowhere = names[4]
    documents: list[Record | Failure] = [
        handmade.out_of_memory(one.run)
        if one.run.recipe == nowhere
        else handmade.completed(one.run, one.run.sequence_length / 100)
        for one in handmade.planned(study)
    ]
    compared = handmade.compared(study, tmp_path, *documents)
    (one,) = pair.pairs(study, compared.to_dicts(), recommend.recommend(compared))
    first, second = scaling.context(one)
    assert [first.name, second.name] == ["context_tiny_cpu", "context_tiny_cpu_2"]
    memory = [point for figure in (first, second) for point in figure.spec["datasets"]["memory"]]
    assert {point["recipe"] for point in memory} == {*names} - {nowhere}
    below = second.spec["datasets"]["nowhere"]
    assert [(one["recipe"], one["x"], one["symbol"]) for one in below] == [(nowhere, 128, "✕"), (nowhere, 256, "✕")]
    charts = [first.spec["hconcat"], second.spec["vconcat"][0]["hconcat"]]
    scales = [panels[0]["layer"][0]["encoding"]["y"]["scale"] for panels in charts]
    assert scales[0] == scales[1]
    assert first.title.endswith("(1 of 2)")


def test_a_recipe_has_one_look_over_all_figures_and_no_two_have_the_same(tmp_path: Path) -> None:
    """Though on one of the models some of them completed nowhere."""
    names = [f"lora-{rank}" for rank in range(1, 21)]
    recipes: dict[str, Any] = {"unused": {}} | {name: {"lora": {"r": int(name[5:])}} for name in names}
    grid = {"targets": ["tiny", "other"], "hardware": "cpu", "recipes": names, "sequence_length": [128, 256]}
    study = handmade.study(models={"tiny": handmade.LLAMA, "other": handmade.LLAMA}, recipes=recipes, grid=[grid])
    nowhere = {("other", name) for name in names[:11:2]}
    documents: list[Record | Failure] = [
        handmade.out_of_memory(one.run)
        if (one.run.target, one.run.recipe) in nowhere
        else handmade.completed(one.run, 1.0)
        for one in handmade.planned(study)
    ]
    compared = handmade.compared(study, tmp_path, *documents)
    looks: dict[str, set[tuple[str, ...]]] = {}
    for one in pair.pairs(study, compared.to_dicts(), recommend.recommend(compared)):
        for figure in scaling.context(one):
            panels = figure.spec.get("hconcat") or figure.spec["vconcat"][0]["hconcat"]
            for panel in panels:
                lines, points, *_ = panel["layer"]
                scales = [
                    layer["encoding"][channel]["scale"]
                    for layer, channel in ((lines, "color"), (lines, "strokeDash"), (points, "shape"))
                ]
                for name, *look in zip(scales[0]["domain"], *(scale["range"] for scale in scales), strict=True):
                    looks.setdefault(name, set()).add(tuple(map(str, look)))
    assert {*looks} == {*names}
    assert {len(found) for found in looks.values()} == {1}
    assert len({look for found in looks.values() for look in found}) == len(names)
    assert [*looks["lora-1"]] == [("#0072b1", "[1, 0]", "circle")], "what no run asks for takes no colour"


def test_of_a_hundred_recipes_a_caption_names_eight_that_are_not_drawn(tmp_path: Path) -> None:
    names = [f"lora-{rank}" for rank in range(1, 101)]
    recipes = {name: {"lora": {"r": int(name[5:])}} for name in names}
    study = handmade.study(recipes=recipes, grid=[BLOCK | {"recipes": names, "sequence_length": [128, 256]}])
    compared = handmade.compared(study, tmp_path, *(handmade.completed(p.run, 1.0) for p in handmade.planned(study)))
    (one,) = pair.pairs(study, compared.to_dicts(), recommend.recommend(compared))
    *_, last = scaling.context(one)
    first = scaling.MAX_SERIES
    assert last.caption == f"Not drawn: {', '.join(names[first : first + 8])}, 60 more."


@pytest.mark.parametrize("contexts", [[128], [128, 256]])
def test_a_panel_without_a_number_is_left_out(tmp_path: Path, contexts: list[int]) -> None:
    study = handmade.study(grid=[BLOCK | {"sequence_length": contexts}])
    found = drawn(study, tmp_path, *(handmade.out_of_memory(one.run) for one in handmade.planned(study)))
    assert {*found} == {"feasibility", "recipes", "models"}
    (panel,) = found["recipes"].spec["hconcat"]
    assert "Peak memory" in json.dumps(panel)


def test_points_of_the_front_are_drawn_above_the_others(tmp_path: Path) -> None:
    """In SVG what comes last covers what comes before; names are given to the front first."""
    names = [f"lora-{rank}" for rank in range(1, 6)]
    recipes = {name: {"lora": {"r": int(name[5:])}} for name in names}
    study = handmade.study(recipes=recipes, grid=[BLOCK | {"recipes": names}])
    numbers = dict(zip(names, ((1.0, 0.5), (2.0, 0.3), (3.0, 0.4), (4.0, 0.2), (5.0, 0.6)), strict=True))
    documents = []
    for run in (one.run for one in handmade.planned(study)):
        seconds, used = numbers[run.recipe]
        documents.append(handmade.completed(run, seconds, used=used))
    datasets = drawn(study, tmp_path, *documents)["pareto"].spec["datasets"]
    assert [(one["recipe"], one["front"]) for one in datasets["points"]] == [
        ("lora-3", False), ("lora-5", False), ("lora-1", True), ("lora-2", True), ("lora-4", True),
    ]  # fmt: skip
    assert [one["recipe"] for one in datasets["names"]][:3] == ["lora-1", "lora-2", "lora-4"]


def test_packed_recipes_hide_no_trade_off(tmp_path: Path) -> None:
    recipes: dict[str, Any] = {"full": {}, "lora": {"lora": {}}, "packed": {"lora": {}, "packing": {}}}
    study = handmade.study(recipes=recipes, grid=[BLOCK | {"recipes": [*recipes]}])
    documents = [handmade.completed(one.run, 1.0) for one in handmade.planned(study)]
    figure = drawn(study, tmp_path, *documents)["pareto"]
    assert {one["recipe"] for one in figure.spec["datasets"]["points"]} == {"full", "lora"}
    assert figure.caption.endswith("Packed recipes are left out: their steps hold more of the examples.")


def test_each_of_few_points_of_the_trade_off_has_its_name() -> None:
    crowd = [
        {"time": 3 + 0.02 * n, "memory": 5 + 0.02 * n, "recipe": f"recipe-{n}", "front": n == 0} for n in range(12)
    ]
    placed = tradeoff.names(crowd, (1.0, 10.0), (1.0, 10.0))
    assert [one["recipe"] for one in placed] == [point["recipe"] for point in crowd]
    assert any(one["away"] and not one["front"] for one in placed)


def test_names_in_the_trade_off_never_lie_on_each_other() -> None:
    times, memories = (1.0, 10.0), (1.0, 10.0)
    points = [{"time": 2 + 0.01 * n, "memory": 5.0, "recipe": f"recipe-{n}", "front": n == 0} for n in range(30)]
    placed = tradeoff.names(points, times, memories)
    assert 1 < len(placed) < 30
    assert placed[0]["recipe"] == "recipe-0"
    boxes = [(one["time"], one["memory"]) for one in placed]
    assert len({*boxes}) == len(boxes)


def test_every_point_of_the_front_has_its_name_if_need_be_with_a_line_to_it() -> None:
    """In a crowd of others: theirs are left out."""
    ends = (1.0, 10.0)
    front = [{"time": 3 + 0.05 * n, "memory": 5 - 0.05 * n, "recipe": f"front-{n}", "front": True} for n in range(5)]
    others = [
        {"time": 3.1 + 0.03 * n, "memory": 5.05 + 0.03 * m, "recipe": f"other-{n}-{m}", "front": False}
        for n in range(8)
        for m in range(8)
    ]
    placed = tradeoff.names([*front, *others], ends, ends)
    named = [one for one in placed if one["front"]]
    assert [one["recipe"] for one in named] == [one["recipe"] for one in front]
    assert {one["away"] for one in named} == {False, True}
    assert all(
        (one["to_time"], one["to_memory"]) == (p["time"], p["memory"]) for one, p in zip(named, front, strict=True)
    )
    assert len(placed) < len(front) + len(others)
