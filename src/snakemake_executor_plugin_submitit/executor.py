"""Between Snakemake and the driver: Snakemake's jobs become work, ends of work become Snakemake's."""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.settings import SharedFSUsage

from snakemake_executor_plugin_submitit.detach import EXIT_LEFT, Detached, Detachment
from snakemake_executor_plugin_submitit.resources import (
    check_countable,
    count_gpus,
    extra_options,
    sbatch_options,
    whole,
)
from snakemake_executor_plugin_submitit.script import NODES_TMPDIR
from snakemake_executor_plugin_submitit.settings import ExecutorSettings

if TYPE_CHECKING:
    from snakemake_executor_plugin_submitit.driver import Driver
    from snakemake_executor_plugin_submitit.task import Task, Work

SECONDS_BETWEEN_ROUNDS = 1.0
"""A round without news costs one look at one folder."""

SYSTEM_TMPDIR = "system_tmpdir"
"""Snakemake's default of the resource `tmpdir`."""

LONGEST_NAME = 200
"""Characters of a job's name; SLURM's accounting keeps up to 255 on common database settings."""


class Executor(RemoteExecutor):
    """`snakemake --executor submitit`."""

    driver: "Driver | None" = None
    """Set when everything is ready: the thread that asks for it is started before."""
    has_left: bool = False
    """The call is ending, and its jobs stay."""

    def __post_init__(self) -> None:
        # Snakemake imports every plugin that is installed, in jobs too; what only this one needs is imported here.
        import shutil

        from snakemake_executor_plugin_submitit.driver import Driver
        from snakemake_executor_plugin_submitit.ledger import Ledger, LedgerInUseError
        from snakemake_executor_plugin_submitit.slurm import Slurm

        missing = [
            command for command in ("sbatch", "srun", "sacct", "squeue", "scancel") if shutil.which(command) is None
        ]
        if missing:
            raise WorkflowError(
                f"SLURM's commands are not there: {', '.join(missing)}. "
                "Run this where jobs are submitted (a login node)."
            )
        if SharedFSUsage.INPUT_OUTPUT not in self.workflow.storage_settings.shared_fs_usage:
            raise WorkflowError(
                "The executor `submitit` needs a file system that driver and nodes share "
                "(--shared-fs-usage input-output)."
            )
        folder = Path(self.workflow.persistence.aux_path).absolute() / "submitit"
        try:
            ledger = Ledger(folder)
        except LedgerInUseError as user:
            self.logger.error(
                f"Another Snakemake drives the jobs of this folder: {user} ({folder / 'lock'}). "
                "Wait for it, or end it; its jobs go on, and this command takes them over then."
            )
            raise SystemExit(EXIT_LEFT) from None
        except OSError as error:
            raise WorkflowError(str(error)) from None
        settings = self.workflow.executor_settings or ExecutorSettings()
        self.detachment = Detachment(settings.detach, self.workflow)
        self.detachment.listen()
        latency_wait = int(self.workflow.execution_settings.latency_wait)
        self.driver = Driver(ledger, Slurm(), settings, self, latency_wait)

    def additional_general_args(self) -> str:
        # A profile may name this executor; inside a job, jobs run where they are. A rule's own `retries` outranks
        # the `--retries 0` that Snakemake gives jobs, and each try would be two; preemptible rules have none.
        return "--executor local --preemptible-rules --preemptible-retries 0"

    def run_jobs(self, jobs: list[Any]) -> None:
        self.detachment.listen()
        # All that are ready come at once, in no order; what comes first is also ahead in SLURM's queue.
        super().run_jobs(sorted(jobs, key=lambda job: -job.priority))

    def run_job(self, job: Any) -> None:
        from snakemake.exceptions import RuleException

        from snakemake_executor_plugin_submitit.task import Task

        assert self.driver is not None
        try:
            work = self._work(job)
            if work.is_direct and not self.driver.goes_on(work):
                self.workflow.async_run(job.prepare())  # what Snakemake does in the job, where there is one
        except (WorkflowError, RuleException, OSError) as error:  # of one job; the others are none the worse for it
            self._report_failure(SubmittedJobInfo(job), f"{_job_name(job)}: {error}", [])
            return
        info = SubmittedJobInfo(job)
        task = Task(work, info)
        info.aux = {"task": task}
        self.driver.add(task)
        self.report_job_submission(info)

    def _work(self, job: Any) -> "Work":
        from snakemake.io import is_flagged

        from snakemake_executor_plugin_submitit.task import Work

        outputs = [str(path) for path in job.output]
        direct = not job.is_group() and self._runs_directly(job)
        command, shell = self._direct_command(job) if direct else (self.format_job_exec(job), "/bin/bash")
        options, extra = sbatch_options(job.resources, job.threads), extra_options(job.resources)
        if clusters := options.get("clusters"):
            assert self.driver is not None
            self.driver.slurm.clusters.update(str(clusters).split(","))
        if self.workflow.executor_settings.max_gpu_hours is not None:
            check_countable(extra)
        minutes = runtime if isinstance(runtime := job.resources.get("runtime"), int) else None
        max_job_minutes = whole(job.resources, "max_job_minutes")
        if max_job_minutes is not None and minutes is None:
            raise WorkflowError(
                f"The resource `max_job_minutes` is {max_job_minutes}, and there is no `runtime`: how many such jobs "
                "share one job of SLURM follows from how long each may take; set `runtime` (minutes)."
            )
        return Work(
            key=_digest(sorted(outputs) or [job.name, *_wildcards(job).items()]),
            digest=_digest(self._definition(job)),
            asked=_digest([options, extra, job.resources.get("submit_kind"), job.resources.get("max_job_minutes")]),
            name=_job_name(job),
            rule=job.name,
            command=command,
            shell=shell,
            workdir=Path.cwd(),
            options=options,
            extra=extra,
            is_direct=direct,
            inputs=[str(path) for path in job.input] if direct else [],
            removed=[path for path in job.output if not is_flagged(path, "update")] if direct else [],
            outputs=outputs,
            exports=_exports(job) if direct else {},
            tmpdir=_tmpdir(job) if direct else None,
            minutes=minutes,
            num_gpus=count_gpus(options, extra),
            max_job_minutes=max_job_minutes,
            kind=job.resources.get("submit_kind"),
            unfit_node_status=whole(job.resources, "unfit_node_status"),
            description={
                "rule": job.name,
                "wildcards": _wildcards(job),
                "input": [str(path) for path in job.input],
                "output": outputs,
                "log": [str(path) for path in job.log],
            },
        )

    def _definition(self, job: Any) -> Any:
        """What makes a job another one although its outputs are the same."""
        if job.is_group():
            return sorted(str(rule) for rule in job.rules)
        params = {name: value for name, value in job.params.items() if isinstance(value, str | int | float | None)}
        return [job.name, job.shellcmd, params, sorted(str(path) for path in job.input)]

    def _runs_directly(self, job: Any) -> bool:
        """Whether the job's shell command is all that there is to run, so that no Snakemake is needed on the node."""
        rule, workflow = job.rule, self.workflow
        return (
            not (workflow.executor_settings and workflow.executor_settings.snakemake_in_job)
            and job.shellcmd is not None
            and "<TBD>" not in job.shellcmd  # a value that is known on the node alone
            and _tmpdir(job) is not None
            and job.benchmark is None
            and not (
                job.is_shadow or job.is_pipe or job.is_service or (workflow.workflow_settings.cache and rule.cache)
            )
            and not workflow.deployment_settings.deployment_method
            and not any(path.is_storage for path in (*job.input, *job.output, *job.log))
        )

    def _direct_command(self, job: Any) -> tuple[str, str]:
        """The command as Snakemake's own shell runs it, and that shell."""
        from snakemake.shell import shell

        executable = job.resources.get("shell_exec") or shell.get_executable() or "/bin/sh"
        prefix, suffix = shell._get_process_prefix(executable), shell._process_suffix
        return " ".join((prefix, job.shellcmd, suffix)).strip(), executable

    async def check_active_jobs(self, active_jobs: list[SubmittedJobInfo]) -> AsyncGenerator[SubmittedJobInfo, None]:
        """One round of the driver for all jobs together."""
        from snakemake_executor_plugin_submitit.base import GaveUpError

        waiting = active_jobs
        if self.driver is not None and not self.has_left:
            try:
                if active_jobs:
                    self.driver.round()
                waiting = [info for info in active_jobs if info.aux["task"].state != "over"]
                jobs = [info.job for info in waiting]
                if self.detachment.is_due(jobs, is_settled=self.driver.is_settled):
                    self._leave(f"{self.driver.left()} To cancel them: scancel, by id.")
            except GaveUpError as error:
                self._leave(str(error))
        for info in waiting:
            yield info

    def _leave(self, why: str) -> None:
        """Ends the call, without a word about failures: of a job that failed Snakemake would delete the outputs, while
        it still writes them. At its next turn Snakemake's scheduler says why, and calls `shutdown`."""
        self.has_left = True
        self.workflow.scheduler.executor_error_callback(Detached(why))

    async def sleep(self) -> None:
        """Until the next round."""
        soon = self.driver.seconds_to_next_round if self.driver is not None else None
        await asyncio.sleep(SECONDS_BETWEEN_ROUNDS if soon is None else soon)

    def cancel(self) -> None:
        if self.has_left:
            # The one way out of Snakemake's scheduler on which it calls nothing a failure, and no `onerror`.
            raise SystemExit(EXIT_LEFT)
        super().cancel()

    def cancel_jobs(self, active_jobs: Iterable[SubmittedJobInfo]) -> None:
        """All jobs of this driver: the list lacks those that are being looked at."""
        if self.driver is None:
            return
        if self.detachment.mode is None:
            self.driver.cancel()
        else:
            self._tmpdir = None
            self.warn(self.driver.left())

    def shutdown(self) -> None:
        if self.driver is not None and self.detachment.is_told and not self.has_left:
            self.has_left = True  # nothing was running any more, and Snakemake's scheduler came here by itself
            self.warn(self.driver.left())
        if self.has_left:
            self._tmpdir = None  # jobs that start Snakemake look for it: it must not be deleted
        super().shutdown()
        if self.driver is not None:
            if strangers := self.driver.strangers():
                ids = " ".join(strangers)
                self.warn(
                    f"An earlier call submitted jobs that this one did not ask for; to cancel them: scancel {ids}"
                )
            self.driver.ledger.release()
        if self.has_left:
            raise Detached("Snakemake's scheduler answers any exception with `cancel`.")

    # What the driver tells.

    def success(self, task: "Task") -> None:
        self.report_job_success(self._named(task))

    def failure(self, task: "Task", message: str, logs: Sequence[Path]) -> None:
        self._report_failure(self._named(task), message, [str(log) for log in logs])

    def _report_failure(self, info: SubmittedJobInfo, message: str, logs: list[str]) -> None:
        self.report_job_error(info, msg=f"{message}. ", aux_logs=logs)
        is_quiet = any(quiet.name == "RULES" for quiet in self.workflow.output_settings.quiet or ())
        if is_quiet or info.job.is_group():
            self.logger.error(message)  # Snakemake itself says nothing of it

    def say(self, message: str) -> None:
        self.logger.info(message)

    def warn(self, message: str) -> None:
        self.logger.warning(message)

    @staticmethod
    def _named(task: "Task") -> SubmittedJobInfo:
        info: SubmittedJobInfo = task.info
        info.external_jobid = task.submission.slurm_id if task.submission else None
        return info


def _wildcards(job: Any) -> dict[str, str]:
    return {} if job.is_group() else {str(key): str(value) for key, value in job.wildcards_dict.items()}


def _job_name(job: Any) -> str:
    """The resource `job_name`, or rule and wildcards, in characters that no tool of SLURM minds."""
    name = job.resources.get("job_name") or "_".join([job.name, *_wildcards(job).values()])
    return re.sub(r"[^\w.,=+@:-]+", "_", str(name), flags=re.ASCII)[:LONGEST_NAME]


def _exports(job: Any) -> dict[str, str]:
    """Variables that Snakemake sets for a shell command (snakemake.shell)."""
    libraries = ("OMP", "GOTO", "OPENBLAS", "MKL", "VECLIB_MAXIMUM", "NUMEXPR")
    return {
        f"{'VECLIB_MAXIMUM_THREADS' if n == 'VECLIB_MAXIMUM' else n + '_NUM_THREADS'}": str(job.threads)
        for n in libraries
    }


def _tmpdir(job: Any) -> str | None:
    """The resource `tmpdir`, which Snakemake's driver leaves to the node: a folder, `NODES_TMPDIR`, or None where only
    Snakemake on the node can tell."""
    resource = job.rule.resources.get("tmpdir")
    if resource is None or getattr(resource, "raw", None) == SYSTEM_TMPDIR:
        return NODES_TMPDIR
    if not hasattr(resource, "is_evaluable"):  # Snakemake 9.6 to 9.14 and later: the value, or by default a function
        return NODES_TMPDIR if callable(resource) else str(resource)
    if resource.is_evaluable():
        return None
    return NODES_TMPDIR if resource.value is None else str(resource.value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:24]
