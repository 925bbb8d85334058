import json
from pathlib import Path
from typing import Any

import pytest

from finetune_study import config, plan, record
from finetune_study.errors import RecordError
from finetune_study.paths import RunPaths
from finetune_study.record import Ending, Failure, Record


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


@pytest.fixture
def completed(raw: dict[str, Any]) -> Record:
    return Record(run=plan.plan(config.parse(raw))[0].run, ending=Ending(status="completed"), ranks=[{"rank": 0}])


FAILURE = Failure(run_id="x", attempt=1, cause="a bug", log="launch.log")


def test_round_trip(paths: RunPaths, completed: Record) -> None:
    record.write_record(paths, completed)
    assert record.read_record(paths.record) == completed
    assert record.glance(paths.record) == (True, True)


def test_never_both(paths: RunPaths, completed: Record) -> None:
    record.write_failure(paths, FAILURE)
    assert paths.failure.exists()
    record.write_record(paths, completed)
    assert not paths.failure.exists()
    record.write_failure(paths, FAILURE)
    assert not paths.failure.exists()


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        record.write_atomically(target, "\ud800")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kept", [0, 1, 50, -1, -2])
def test_a_truncated_record_is_noticed_and_named(paths: RunPaths, completed: Record, kept: int) -> None:
    record.write_record(paths, completed)
    text = paths.record.read_text()
    paths.record.write_text(text[:kept])
    assert not record.glance(paths.record).is_whole
    if kept != -1:  # without its last line break it is still whole JSON
        with pytest.raises(RecordError, match=r"record\.json is damaged") as caught:
            record.read_record(paths.record)
        assert str(paths.record) in str(caught.value)
        assert "restore it from a backup, or delete it" in str(caught.value)


def test_a_record_of_a_newer_version_is_refused(paths: RunPaths, completed: Record) -> None:
    record.write_record(paths, completed)
    document = json.loads(paths.record.read_text()) | {"format": record.FORMAT + 1}
    paths.record.write_text(json.dumps(document))
    with pytest.raises(RecordError, match="newer version"):
        record.read_record(paths.record)


def test_statuses_are_the_closed_list() -> None:
    assert record.STATUSES == (
        "completed", "device_oom", "host_oom", "timeout", "unsupported", "implied_oom", "predicted_oom",
    )  # fmt: skip
