"""The whole examination: what can be seen from here, then one short job for each hardware entry."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune_study.config import Config
from finetune_study.doctor import describe, limits, login, probe
from finetune_study.doctor import entries as entries_module
from finetune_study.doctor.entries import Entry
from finetune_study.doctor.findings import Finding, Findings
from finetune_study.doctor.judge import judge, judge_draft
from finetune_study.doctor.probe import Probe
from finetune_study.doctor.scheduler import Cluster
from finetune_study.errors import ConfigError
from finetune_study.paths import Results

NOT_WORTH_A_JOB = {"partition", "account", "qos", "software"}
"""Checks that, where they find something wrong, say that a job could not even start."""


@dataclass
class Examination:
    """What was found, and what a description of the cluster is made of."""

    entries: list[Entry]
    cluster: Cluster | None = None
    probes: list[Probe] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        return not any(finding.verdict == "wrong" for finding in self.findings)

    def description(self) -> str | None:
        """The cluster's description; None where SLURM does not answer."""
        if self.cluster is None:
            return None
        gpus = {entry.name: probe.gpus for probe in self.probes for entry in probe.entries}
        return describe.describe(self.cluster, self.entries, gpus)


def examine(
    config: Config | None,
    results: Results,
    *,
    say: Callable[[str], None],
    only: Sequence[str] = (),
    with_jobs: bool = True,
    wait_minutes: float = 10.0,
    with_drafts: bool = False,
) -> Examination:
    """Examines a cluster for a study.

    Args:
        config: of the study; None examines the cluster alone.
        results: of the study: the jobs' files lie there while they run.
        say: takes lines of progress.
        only: hardware entries to look at; all, if empty.
        with_jobs: submit jobs; without, only what can be seen from here is checked.
        wait_minutes: how long a job may wait in the queue.
        with_drafts: look at GPUs that no hardware entry describes as well.

    Raises:
        ConfigError: for a name of a hardware entry that there is not.
    """
    of_study = entries_module.of_study(config) if config else []
    entries = _chosen(of_study, only)
    here = Findings()
    done = Examination(entries, cluster=login.slurm(here))
    can_write = login.folders(results, here)
    if config is not None:
        login.hub(config, entries, results, here)
    if done.cluster is None:
        done.findings = here.all
        return done
    if with_drafts:
        done.entries = [*entries, *describe.drafts(done.cluster, of_study)]
    found = {entry.name: Findings(entry.name) for entry in done.entries}
    for entry in entries:
        login.entry_software(entry, found[entry.name])
        limits.check(entry, done.cluster, found[entry.name])
    if with_jobs:
        _send_jobs(done, done.cluster, results if can_write else None, found, wait_minutes, say)
    done.findings = here.all + [one for entry in done.entries for one in _weighed(entry, found[entry.name])]
    if can_write:
        _leave(results.doctor)
    return done


def _chosen(entries: list[Entry], only: Sequence[str]) -> list[Entry]:
    there = [entry.name for entry in entries]
    if unknown := [name for name in only if name not in there]:
        raise ConfigError(
            "There is no such hardware entry",
            where="--hardware",
            given=", ".join(unknown),
            allowed=", ".join(there) or "none: the config has no hardware entry",
        )
    # Who asks for an entry by its name wants to hear what is wrong with it.
    return [entry if not only else replace(entry, is_used=True) for entry in entries if not only or entry.name in only]


def _weighed(entry: Entry, findings: Findings) -> list[Finding]:
    return findings.all if entry.is_used else findings.as_warnings()


def _send_jobs(
    done: Examination,
    cluster: Cluster,
    results: Results | None,
    found: dict[str, Findings],
    wait_minutes: float,
    say: Callable[[str], None],
) -> None:
    worth_it = []
    for entry in done.entries:
        obstacles = found[entry.name].wrong_checks() & NOT_WORTH_A_JOB
        if results is None:
            obstacles.add("results")
        if obstacles:
            what = f"none was submitted: {', '.join(sorted(obstacles))} would have stopped it"
            found[entry.name].warn("job", what, "mend that first, and call the doctor again")
        else:
            worth_it.append(entry)
    if results is None:
        return
    done.probes = [probe.prepare(group, cluster, results) for group in entries_module.groups(worth_it)]
    probe.run(done.probes, wait_minutes, say)
    for one in done.probes:
        for entry in one.entries:
            (judge_draft if entry.is_draft else judge)(one, entry, found[entry.name])
        if not any(found[entry.name].wrong_checks() for entry in one.entries):
            probe.tidy(one)


def _leave(folder: Path) -> None:
    """Takes the folder of jobs away when nothing is left in it."""
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
