"""A folder in which Snakemake runs with the executor, as a user calls it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.slurm.cluster import LIMIT_SECONDS, Attempt, Queued, attempts, queue, wait_for

UNTIL_GO = "until [ -e go ]; do sleep 0.1; done"
"""A job that ends when the test lets it."""

PENDING = {"slurm_extra": "--begin=now+1hour"}
"""Of a job that is in the queue until it is released; sacct does not find one by name that was held all its life."""

EAT_300_MB = "head -c 300M /dev/zero | tail -n 1 | wc -c"
"""`tail` keeps a line whole, and here is one without end."""

ALWAYS = (
    "--executor=submitit",
    "--nolock",
    "--rerun-incomplete",
    "--keep-going",
    "--submitit-status-interval=2",
    "--submitit-array-limit=1",
)
"""As profiles of a study have it, but quick to ask."""

PREAMBLE = """\
NAME = {name!r}

rule all:
    default_target: True
    input: {targets}
"""

RULE = """
rule {rule}:
    input: {input}
    output: {output}
    resources: job_name=NAME + {rule!r}{resources}
    shell:
        r'''
        echo "$SLURM_JOB_ID" >> {begun}
{command}
        '''
"""


@dataclass(frozen=True)
class Ended:
    """A call of Snakemake that is over."""

    status: int
    output: str
    """stdout and stderr together."""

    def message(self, name: str) -> str:
        """What was said of the failure of the job of a name."""
        found = re.findall(rf"^ +message: [0-9a-f]{{8}}-{name}: (.*(?:\n(?!    \w+:).*)*)", self.output, re.MULTILINE)
        assert len(found) == 1, f"{len(found)} messages of {name} in: {self.output}"
        return str(found[0])

    @property
    def failed(self) -> set[str]:
        """Rules of which a failure was told."""
        return set(re.findall(r"^Error in rule (\w+):", self.output, re.MULTILINE))


class Driver:
    """Snakemake at work."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self.process, self._log = process, log

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self._log.read_text(encoding="utf-8")

    def wait(self) -> Ended:
        """Lets it run to its end."""
        try:
            self.process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"Snakemake does not end: {self.output}") from None
        return Ended(self.process.returncode, self.output)

    def wait_until_said(self, pattern: str) -> "re.Match[str]":
        """Until its output holds a pattern."""

        def said() -> "re.Match[str] | None":
            assert self.process.poll() is None or re.search(pattern, self.output), f"no {pattern!r} in {self.output}"
            return re.search(pattern, self.output)

        match: re.Match[str] = wait_for(said, f"Snakemake says {pattern!r}")
        return match

    def kill(self) -> None:
        """`kill -9` of the driver alone."""
        self.process.kill()
        self.process.wait()

    def signal_all(self, number: signal.Signals) -> None:
        """A signal to driver and children, as a terminal sends it."""
        os.killpg(self.process.pid, number)


class Place:
    """A folder with a Snakefile; its jobs have names of their own in all of the cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"{uuid.uuid4().hex[:8]}-"
        self._rules: dict[str, str] = {}
        self._outputs: dict[str, Sequence[str]] = {}
        self._drivers: list[Driver] = []
        self._others: list[Place] = []
        (folder / "begun").mkdir(parents=True)

    # What runs

    def rule(
        self,
        name: str,
        command: str,
        *,
        makes: Sequence[str] | None = None,
        needs: Sequence[str] = (),
        **resources: Any,
    ) -> None:
        """Adds a rule, or changes it: its job notes that it began, runs the command and makes `<name>.out`.

        Args:
            name: of the rule, and the end of its job's name in SLURM.
            command: for the shell, in which Snakemake's braces work; it makes the output unless `makes` is given.
            makes: its outputs, if it makes them itself.
            needs: its inputs.
            resources: more of them.
        """
        outputs = makes or [f"{name}.out"]
        if not makes:
            command = f"{command}\necho done > {outputs[0]}"
        self._outputs[name] = outputs
        self._rules[name] = RULE.format(
            rule=name,
            input=", ".join(map(repr, needs)),
            output=", ".join(map(repr, outputs)),
            resources="".join(f", {resource}={value!r}" for resource, value in resources.items()),
            begun=f"begun/{name}",
            command=textwrap.indent(command, 8 * " "),
        )
        targets = ", ".join(repr(path) for paths in self._outputs.values() for path in paths)
        self.snakefile(PREAMBLE.format(name=self.name, targets=targets) + "".join(self._rules.values()))

    def snakefile(self, text: str) -> None:
        (self.folder / "Snakefile").write_text(text, encoding="utf-8")

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    def hook(self, name: str, code: str) -> str:
        """A Python script; returns the command that runs it."""
        path = self.write(name, "import json, os, pathlib, sys\ngiven = json.load(sys.stdin)\n" + textwrap.dedent(code))
        return f"{shlex.quote(sys.executable)} {shlex.quote(str(path))}"

    # Snakemake

    def start(self, *arguments: str, jobs: int = 50, **environment: str) -> Driver:
        """Snakemake, at work."""
        log = self.folder / f"driver-{len(self._drivers)}.log"
        defaults = ("--default-resources", "mem_mb=100", "runtime=10")
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "snakemake", *ALWAYS, f"--jobs={jobs}", *defaults, *arguments],
                cwd=self.folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                # As in a terminal, where these tests were not started by nohup.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            )
        driver = Driver(process, log)
        self._drivers.append(driver)
        return driver

    def snakemake(self, *arguments: str, **more: Any) -> Ended:
        """Snakemake, run to its end."""
        return self.start(*arguments, **more).wait()

    def other(self, name: str) -> "Place":
        """Another place, below this one."""
        self._others.append(Place(self.folder / name))
        return self._others[-1]

    def leave(self) -> None:
        """Ends the drivers that are still there."""
        for other in self._others:
            other.leave()
        for driver in self._drivers:
            if driver.process.poll() is None:
                driver.kill()

    # What became of it

    def path(self, name: str) -> Path:
        return self.folder / name

    def go(self) -> None:
        """Lets jobs end that wait for it."""
        (self.folder / "go").touch()

    def begun(self, rule: str) -> list[str]:
        """The SLURM ids of the jobs in which the command of a rule began, in order."""
        path = self.folder / "begun" / rule
        return path.read_text(encoding="utf-8").split() if path.exists() else []

    def wait_until_begun(self, *rules: str, times: int = 1) -> None:
        for rule in rules:
            wait_for(lambda rule=rule: len(self.begun(rule)) >= times, f"{rule} runs for time {times}")  # type: ignore[misc]

    def attempts(self, rule: str) -> list[Attempt]:
        """What accounting has of the jobs of a rule."""
        return attempts(self.name + rule)

    def release(self, *rules: str) -> None:
        """Lets pending jobs begin."""
        for rule in rules:
            (job,) = self.queued(rule)
            subprocess.run(["scontrol", "update", f"JobId={job.slurm_id}", "StartTime=now"], check=True)

    def wait_until_accounted(self, rule: str, *states: str) -> None:
        """Until accounting, which lags, has all its jobs in those states."""
        wait_for(
            lambda: [attempt.state.split()[0] for attempt in self.attempts(rule)] == list(states),
            f"accounting has {rule} as {states}",
        )

    def queued(self, rule: str) -> list[Queued]:
        """Its jobs that are not over."""
        return [job for job in queue() if job.name == self.name + rule]

    def wait_until_over(self, *rules: str) -> None:
        """Until SLURM has no job of those rules any more."""
        for rule in rules:
            wait_for(lambda rule=rule: not self.queued(rule), f"the jobs of {rule} are over")  # type: ignore[misc]

    @property
    def ledger(self) -> Path:
        return self.folder / ".snakemake" / "auxiliary" / "submitit" / "ledger.jsonl"

    def events(self) -> list[dict[str, Any]]:
        """What the drivers noted."""
        return [json.loads(line) for line in self.ledger.read_text(encoding="utf-8").splitlines()]

    def edit_ledger(self, events: Sequence[dict[str, Any]]) -> None:
        self.ledger.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")

    def open_tokens(self) -> set[str]:
        """Of submissions that nobody has concluded."""
        events = self.events()
        opened = {event["token"] for event in events if event["event"] == "intent"}
        return opened - {event["token"] for event in events if event["event"] == "closed"}

    def submission(self, rule: str) -> dict[str, Any]:
        """The last one of a rule, as it was noted before."""
        return [e for e in self.events() if e["event"] == "intent" and e["name"] == self.name + rule][-1]
