"""Checks from the login node, each seen to fail for real: folders, PATH, and a hub on this machine."""

import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from finetune_study.doctor import entries, login
from finetune_study.doctor.findings import Findings
from finetune_study.paths import Results
from tests.tiny_study import TINY_STUDY
from tests.unit import handmade

HUB_MODEL = {"name_or_path": "lab/model"}
WHEEL = {"distribution": "llm-x", "version": "1", "file": "x.gguf"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Something that answers, though it knows nothing: a hub that is reached."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def hub_check(results: Results, **model: object) -> tuple[str, str]:
    config = handmade.study(models={"tiny": model or handmade.LLAMA})
    findings = Findings()
    login.hub(config, entries.of_study(config), results, findings)
    (found,) = findings.all
    return found.verdict, found.found


def test_hub_that_answers(hub: None, tmp_path: Path) -> None:
    assert hub_check(Results(tmp_path))[0] == "ok"
    verdict, found = hub_check(Results(tmp_path), **HUB_MODEL)
    assert (verdict, "still to fetch: lab/model" in found) == ("ok", True)


def test_hub_that_is_needed_and_can_not_be_reached(no_hub: None, tmp_path: Path) -> None:
    verdict, found = hub_check(Results(tmp_path), **HUB_MODEL)
    assert (verdict, "not prepared yet: lab/model" in found) == ("wrong", True)
    assert hub_check(Results(tmp_path), **HUB_MODEL, wheel=WHEEL)[0] == "warning"
    assert hub_check(Results(tmp_path))[0] == "warning"


def test_offline_with_all_prepared_is_a_warning(hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_check(Results(tmp_path), **HUB_MODEL)[0] == "wrong"
    config = handmade.study(models={"tiny": HUB_MODEL})
    run = handmade.planned(config)[0].run
    folder = Results(tmp_path).model(run.model_key)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"files": []}))
    verdict, found = hub_check(Results(tmp_path), **HUB_MODEL)
    assert (verdict, found) == ("warning", "HF_HUB_OFFLINE is set; nothing is to be fetched from it")


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = Findings()
    assert login.folders(Results(tmp_path / "results"), findings)
    assert [one.check for one in findings.all] == ["results", "locks", "free space"]
    assert {one.verdict for one in findings.all[:2]} == {"ok"}
    for free, verdict in ((10, "warning"), (0.5, "wrong")):
        monkeypatch.setattr(login, "MUCH_GIB", shutil.disk_usage(tmp_path).free / login.GIB + 20 - free)
        monkeypatch.setattr(login, "LITTLE_GIB", shutil.disk_usage(tmp_path).free / login.GIB + 1 - free)
        findings = Findings()
        login.folders(Results(tmp_path / "results"), findings)
        assert findings.all[-1].verdict == verdict


def test_results_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "results").touch()
    for root in (Path("/proc/doctor"), tmp_path / "results"):
        findings = Findings()
        assert not login.folders(Results(root), findings)
        assert findings.wrong_checks() == {"results"}


def test_without_slurm_on_path_it_says_so_and_stops(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yaml").write_text(yaml.safe_dump(TINY_STUDY))
    answer = subprocess.run(
        [sys.executable, "-m", "finetune_study.cli", "doctor", "--json"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 1, answer.stderr
    said = json.loads(answer.stdout)
    (wrong,) = [one for one in said["findings"] if one["verdict"] == "wrong"]
    assert wrong["check"] == "commands"
    assert wrong["found"] == "not on PATH: sbatch, squeue, sacct, scontrol, sinfo, sacctmgr, scancel"
    assert said["jobs"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hardware", "h100"], "allowed: cpu"),
        (["x.yaml"], "add --describe"),
        (["--config", "nowhere.yaml"], "The configuration can't be read"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yaml").write_text(yaml.safe_dump(TINY_STUDY))
    answer = subprocess.run(
        [sys.executable, "-m", "finetune_study.cli", "doctor", "--no-jobs", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 1
    assert words in answer.stderr
    assert "Traceback" not in answer.stderr
