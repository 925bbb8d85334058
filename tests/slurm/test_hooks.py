"""`before_submit` has a say about jobs that are not yet submitted, held, or pending, and nothing about any other."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import wait_for
from tests.slurm.place import PENDING, UNTIL_GO, Driver, Place

pytestmark = [pytest.mark.slurm, pytest.mark.long]

HOOK = """
with open("asked", "a") as stream:
    print(json.dumps(given["jobs"]), file=stream)
verdicts = json.loads(pathlib.Path("verdicts").read_text())
answer = {}
for job in given["jobs"]:
    verdict = verdicts.get(job["rule"])
    if verdict == "resolved":
        pathlib.Path(job["output"][0]).write_text("from the hook")
    if verdict:
        answer[job["id"]] = verdict
print(json.dumps(answer))
"""
"""Notes what it was given, and answers by rule what a file says."""


def start(place: Place, *arguments: str, **verdicts: str) -> Driver:
    say(place, **verdicts)
    hook = place.hook("before_submit.py", HOOK)
    return place.start("--submitit-before-submit", hook, "--submitit-before-submit-interval=1", *arguments)


def say(place: Place, **verdicts: str) -> None:
    """What the hook answers from now on."""
    path = place.path("verdicts.tmp")
    path.write_text(json.dumps(verdicts), encoding="utf-8")
    path.replace(place.path("verdicts"))


def asked(place: Place) -> list[list[dict[str, Any]]]:
    """What the hook was given, question by question."""
    path = place.path("asked")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def states(place: Place, rule: str) -> list[str]:
    """Of a rule's job, question by question."""
    return [job["state"] for question in asked(place) for job in question if job["rule"] == rule]


def wait_until_asked(place: Place, rule: str, state: str, times: int = 1) -> None:
    wait_for(lambda: states(place, rule).count(state) >= times, f"the hook is asked about {rule}, {state}")


def test_new_jobs_are_submitted_held_or_resolved(place: Place) -> None:
    """Who is not named is submitted, and so is who is called resolved while an output is missing."""
    place.rule("works", UNTIL_GO)
    place.rule("submitted", "true")
    place.rule("not_named", "true")
    place.rule("resolved", "true")
    place.rule("promised", "echo done | tee promised.out missing.out", makes=["promised.out", "missing.out"])
    place.rule("held", "true")
    place.rule("held_until_the_hook_breaks", "true")
    held = {"held": "hold", "held_until_the_hook_breaks": "hold"}
    driver = start(place, works="submit", submitted="submit", resolved="resolved", promised="resolved", **held)
    driver.wait_until_said("resolved: resolved by before_submit, not run")
    driver.wait_until_said("promised: before_submit calls it resolved, but there is no missing.out")
    place.wait_until_begun("works", "submitted", "not_named", "promised")
    wait_until_asked(place, "held", "held", times=2)
    assert not place.attempts("held")

    say(place, held="submit", held_until_the_hook_breaks="hold")
    place.wait_until_begun("held")
    say(place, held_until_the_hook_breaks="nonsense")
    place.wait_until_begun("held_until_the_hook_breaks")
    place.go()
    ended = driver.wait()
    assert ended.status == 0, ended.output
    assert place.path("resolved.out").read_text() == "from the hook"
    assert not place.attempts("resolved")
    assert place.path("missing.out").read_text() == "done\n"
    for rule in ("works", "submitted", "not_named", "promised", *held):
        assert len(place.begun(rule)) == 1


def test_pending_jobs_are_withdrawn_when_held_or_resolved(place: Place) -> None:
    """But nothing that runs is."""
    place.rule("works", UNTIL_GO)
    place.rule("resolved", "true", **PENDING)
    place.rule("held", "true", **PENDING)
    place.rule("stays", "true", **PENDING)
    driver = start(place)
    place.wait_until_begun("works")
    wait_for(lambda: all(place.queued(rule) for rule in ("resolved", "held", "stays")), "they are pending")
    (first,) = place.queued("held")
    (stays,) = place.queued("stays")

    say(place, works="resolved", resolved="resolved", held="hold", stays="submit")
    driver.wait_until_said("resolved: resolved by before_submit, not run")
    place.wait_until_over("resolved")
    place.wait_until_accounted("resolved", "CANCELLED")
    wait_until_asked(place, "held", "held", times=2)
    place.wait_until_accounted("held", "CANCELLED")
    assert place.queued("stays") == [stays]
    assert [job.state for job in place.queued("works")] == ["RUNNING"]

    say(place)
    wait_for(lambda: place.queued("held"), "it is submitted again")
    (second,) = place.queued("held")
    assert second.slurm_id != first.slurm_id
    place.release("held", "stays")
    place.go()
    ended = driver.wait()
    assert ended.status == 0, ended.output
    assert not place.begun("resolved")
    assert place.path("resolved.out").read_text() == "from the hook"
    assert (place.begun("held"), place.begun("stays")) == ([second.slurm_id], [stays.slurm_id])
    assert len(place.begun("works")) == 1
    assert place.path("works.out").read_text() == "done\n"
    assert not place.open_tokens()


def test_hook_is_given_all_of_each_job(place: Place) -> None:
    place.snakefile(f"""
rule all:
    default_target: True
    input: "works.out", "a/b c.txt"

rule works:
    output: "works.out"
    resources: slurm_partition="v100"
    shell: "{UNTIL_GO}; touch {{output}}"

rule named:
    input: "given.txt"
    output: "{{where}}/{{what}}.txt", "{{where}}/{{what}}.more"
    log: "logs/{{where}} {{what}}.log"
    resources: job_name={place.name + "named"!r}, slurm_extra="--begin=now+1hour"
    shell: "touch {{output:q}}"
""")
    place.write("given.txt", "given")
    driver = start(place, named="hold")
    wait_until_asked(place, "named", "held", times=3)
    say(place)
    wait_until_asked(place, "named", "pending", times=2)
    place.release("named")
    place.go()
    ended = driver.wait()
    assert ended.status == 0, ended.output

    given = [job for question in asked(place) for job in question if job["rule"] == "named"]
    seen = [job.pop("state") for job in given]
    assert list(dict.fromkeys(seen)) == ["new", "held", "pending"]
    waited = [job.pop("waited_seconds") for job in given]
    assert waited == sorted(waited)
    assert waited[0] < waited[-1]
    for question in asked(place):
        assert len({job["id"] for job in question}) == len(question)
    (job_id,) = {job.pop("id") for job in given}
    assert isinstance(job_id, str)
    for job in given:
        assert job == {
            "rule": "named",
            "wildcards": {"where": "a", "what": "b c"},
            "input": ["given.txt"],
            "output": ["a/b c.txt", "a/b c.more"],
            "log": ["logs/a b c.log"],
        }


def test_hold_policy(place: Place) -> None:
    """Nobody is held when nothing else is queued or running, nor for longer than agreed; for neither is a job taken out
    of the queue."""
    alone = place.other("alone")
    alone.rule("works", "true")
    alone.rule("held", "true", **PENDING)
    alone_driver = start(alone, held="hold")
    at_once = place.other("at once")
    at_once.rule("works", UNTIL_GO)
    at_once.rule("held", "true")
    at_once.rule("pending", "true", **PENDING)
    at_once_driver = start(at_once, "--submitit-hold-minutes=0", held="hold", pending="hold")

    alone.wait_until_begun("works")
    wait_until_asked(alone, "held", "pending", times=3)
    at_once.wait_until_begun("works", "held")
    wait_until_asked(at_once, "pending", "pending", times=3)
    alone.release("held")
    at_once.release("pending")
    at_once.wait_until_begun("pending")
    at_once.go()
    for one, driver in ((alone, alone_driver), (at_once, at_once_driver)):
        ended = driver.wait()
        assert ended.status == 0, ended.output
        for rule in ("works", "held", *(("pending",) if one is at_once else ())):
            assert len(one.begun(rule)) == len(one.attempts(rule)) == 1


BROKEN = {
    "status": ("sys.exit('it has no idea')", "before_submit ended with status 1: it has no idea"),
    "garbage": ("print('all is well')", "it said: 'all is well'"),
    "list": ("print('[]')", "before_submit must answer with a JSON object of submit, hold, resolved by job id"),
    "verdict": ("print(json.dumps({job['id']: 'perhaps' for job in given['jobs']}))", ': "perhaps"}'),
    "silence": ("", "it said: ''"),
}


def test_broken_hook_holds_nothing_up_and_is_told(place: Place) -> None:
    """One that fails, answers with anything else, or is not there."""
    started = {}
    for name, (code, _) in BROKEN.items():
        one = place.other(name)
        one.rule("runs", "true")
        started[name] = one, one.start("--submitit-before-submit", one.hook("before_submit.py", code))
    one = place.other("absent")
    one.rule("runs", "true")
    started["absent"] = one, one.start("--submitit-before-submit", str(Path("no") / "such" / "command"))

    said = {name: words for name, (_, words) in BROKEN.items()} | {"absent": "before_submit ended with status 127"}
    for name, (one, driver) in started.items():
        ended = driver.wait()
        assert ended.status == 0, ended.output
        assert len(one.begun("runs")) == 1
        assert said[name] in ended.output
        assert "A hook that fails holds nothing up: the jobs are submitted." in ended.output
