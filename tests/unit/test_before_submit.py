import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_study import record, study
from finetune_study import run as run_module
from finetune_study.before_submit import before_submit
from finetune_study.errors import RunFailedError
from finetune_study.study import Study
from tests.unit import handmade
from tests.unit.test_implied import again, end, outcome_of, planned

__all__ = ["planned"]


def asked(planned: Study, *run_ids: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": f"job {run_id}",
            "state": "new",
            "waited_seconds": 0,
            "rule": "finetune",
            "wildcards": {"run_id": run_id},
            "input": ["results/plan.json"],
            "output": [str(planned.results.run(run_id).record)],
            "log": [],
        }
        | more
        for run_id in run_ids
    ]


def answer(planned: Study, *jobs: dict[str, Any]) -> dict[str, str]:
    """By the run_id."""
    said: dict[str, str] = json.loads(before_submit(json.dumps({"jobs": jobs}), planned.results))
    return {job.removeprefix("job "): verdict for job, verdict in said.items()}


def test_what_is_implied_is_resolved_and_has_its_record(planned: Study) -> None:
    short, middle, long = planned.planned
    end(planned, short)
    pending = asked(planned, long, state="pending")
    assert answer(planned, *asked(planned, middle), *pending) == {middle: "resolved", long: "resolved"}
    for run_id in (middle, long):
        assert outcome_of(planned, run_id).witness == short


def test_what_an_easier_run_may_yet_decide_is_held(planned: Study) -> None:
    short, middle, long = planned.planned
    everything = asked(planned, short, middle, long)
    assert answer(planned, *everything) == {middle: "hold", long: "hold"}
    queued = asked(planned, short, state="pending")
    assert answer(planned, *queued, *asked(planned, long, state="held")) == {long: "hold"}
    assert answer(planned, *asked(planned, long)) == {}, "nothing easier is queued"
    # What is in the queue already keeps its place there.
    assert answer(planned, *queued, *asked(planned, long, state="pending")) == {}
    end(planned, middle, status="completed", phase=None)
    assert answer(planned, *queued, *asked(planned, long)) == {long: "hold"}
    end(planned, short, status="completed", phase=None)
    assert answer(planned, *asked(planned, long)) == {}


def test_half_of_the_jobs_at_most_are_held_those_that_most_runs_may_decide(planned: Study) -> None:
    raw = planned.config.model_dump(mode="json")
    raw["grid"][0]["sequence_length"] = list(range(64, 70))
    many = study.open_study(raw, planned.results)
    study.write_plan(many)
    ladder = list(many.planned)
    assert answer(many, *asked(many, *reversed(ladder))) == dict.fromkeys(ladder[3:], "hold")
    # The first three began, and are not asked about any more; the others are let go as the queue empties.
    for run_id in ladder[:3]:
        record.write_about(many.results.run(run_id), record.About(attempt=1))
    assert answer(many, *asked(many, *ladder[3:], state="held")) == dict.fromkeys(ladder[4:], "hold")
    assert answer(many, *asked(many, ladder[5], state="held")) == {ladder[5]: "hold"}


def test_nobody_waits_for_a_run_that_could_tell_nothing_new(planned: Study) -> None:
    """A repeat of the harder run has shown that it fits."""
    raw = planned.config.model_dump(mode="json")
    raw["protocol"]["repeats"] = 2
    both = study.open_study(raw, planned.results)
    study.write_plan(both)
    _, _, long, short_again, _, long_again = both.planned
    end(both, long, status="completed", phase=None)
    assert answer(both, *asked(both, short_again, long_again)) == {}


def test_a_run_at_work_is_waited_for(planned: Study) -> None:
    """Until it has an outcome, or a failure that is newer than its start."""
    short, _, long = planned.planned
    paths = planned.results.run(short)
    record.write_about(paths, record.About(attempt=1))
    os.utime(paths.about, (100, 100))
    assert answer(planned, *asked(planned, long)) == {long: "hold"}
    record.write_failure(paths, handmade.failure(planned.run(short)))
    assert answer(planned, *asked(planned, long)) == {}
    os.utime(paths.failure, (50, 50))
    assert answer(planned, *asked(planned, long)) == {long: "hold"}


def test_what_is_asked_for_by_hand_is_submitted(planned: Study) -> None:
    short, _, long = planned.planned
    end(planned, short)
    request = f"results/runs/{long}/remeasure-1.request"
    assert answer(planned, *asked(planned, long, input=["results/plan.json", request])) == {}
    assert not planned.results.run(long).record.exists()


def test_other_jobs_and_a_study_without_it_are_left_alone(planned: Study) -> None:
    short, _, long = planned.planned
    end(planned, short)
    assert answer(planned, *asked(planned, long, rule="prepare_data")) == {}
    assert answer(planned, *asked(planned, "no-such-run")) == {}
    planned.results.run(long).run_yaml.unlink()
    assert answer(planned, *asked(planned, long)) == {}, "its job says that there is no run.yaml"
    study.write_plan(again(planned, infer_oom=False))
    assert answer(planned, *asked(planned, short, long)) == {}
    for text in ("", "{}", '{"runs": []}'):
        planned.results.plan.write_text(text)
        assert answer(planned, *asked(planned, short, long)) == {}


def test_the_command(planned: Study, tmp_path: Path) -> None:
    """As the executor calls it; what is no question is a message."""
    short, middle, _ = planned.planned
    end(planned, short)

    def called(text: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "finetune_study.cli", "before-submit", "--results", str(tmp_path)]
        return subprocess.run(command, input=text, capture_output=True, text=True)

    said = called(json.dumps({"jobs": asked(planned, middle)}))
    assert (said.returncode, json.loads(said.stdout)) == (0, {f"job {middle}": "resolved"})
    assert called("nonsense").stderr.startswith("This does not describe jobs: Invalid JSON")


def test_run_yaml_of_the_witness_is_not_needed(planned: Study) -> None:
    short, middle, _ = planned.planned
    end(planned, short)
    planned.results.run(short).run_yaml.unlink()
    assert answer(planned, *asked(planned, middle)) == {middle: "resolved"}
    assert run_module.load(planned.results.run(middle).run_yaml) == planned.run(middle)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"jobs": [{"state": "new"}]}'])
def test_what_is_no_question_is_refused(planned: Study, text: str) -> None:
    with pytest.raises(RunFailedError, match="This does not describe jobs"):
        before_submit(text, planned.results)
