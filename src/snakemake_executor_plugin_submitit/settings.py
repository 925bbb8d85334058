"""Settings of the executor; each is an option `--submitit-<name>` and a key of a profile."""

from dataclasses import dataclass, field
from typing import Optional

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.settings import ExecutorSettingsBase

from snakemake_executor_plugin_submitit.detach import MODES


def _setting(help_text: str) -> dict[str, object]:
    return {"help": help_text, "env_var": False, "required": False}


@dataclass
class ExecutorSettings(ExecutorSettingsBase):
    """What a user may set; every field has a default."""

    def __post_init__(self) -> None:
        least = {"status_interval": 1, "array_limit": 1} | dict.fromkeys(
            ("patience_minutes", "lost_after_seconds", "resubmit_limit", "before_submit_interval", "hold_minutes",
             "failure_limit", "max_gpu_hours"), 0,
        )  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and not (minimum <= value < float("inf")):
                option = f"--submitit-{name.replace('_', '-')}"
                raise WorkflowError(f"{option} is {value}; it must be a number of at least {minimum}.")

    status_interval: int = field(
        default=20,
        metadata=_setting(
            "Seconds between two questions to SLURM about all jobs. Jobs that end by themselves are noticed within "
            "about a second without asking."
        ),
    )
    patience_minutes: int = field(
        default=30,
        metadata=_setting("How long a SLURM that is busy, restarting or out of reach is asked again."),
    )
    lost_after_seconds: int = field(
        default=180,
        metadata=_setting("A job that SLURM does not know for so long is lost."),
    )
    resubmit_limit: int = field(
        default=3,
        metadata=_setting(
            "How often a job is submitted again, or may be requeued, when its node fails or is not what was asked for, "
            "or it is preempted."
        ),
    )
    after_kill: Optional[str] = field(
        default=None,
        metadata=_setting(
            "Command that may turn a kill by the scheduler (OUT_OF_MEMORY, TIMEOUT, DEADLINE) into a result. It gets "
            "the job as JSON on standard input; when it ends with 0 and the job's outputs exist, the job succeeded."
        ),
    )
    before_submit: Optional[str] = field(
        default=None,
        metadata=_setting(
            "Command that is asked about jobs before they are submitted, and again while they wait in the queue. It "
            "gets JSON on standard input and answers with JSON: submit, hold, or resolved (its outputs are there)."
        ),
    )
    before_submit_interval: int = field(
        default=60,
        metadata=_setting("Seconds until `before_submit` is asked again about jobs that are held or pending."),
    )
    hold_minutes: int = field(
        default=60,
        metadata=_setting("A job is held at most so long; when no job is queued or running, none is held."),
    )
    detach: Optional[str] = field(
        default=None,
        metadata=_setting(
            "When the call ends and leaves its jobs in SLURM, for the same command to come back to. on-signal: on "
            "Ctrl-C, SIGTERM and SIGHUP, which otherwise cancel the jobs (Ctrl-C) or wait for them (SIGTERM); "
            "when-submitted: also by itself, as soon as waiting for jobs is all that is left to do. Exit status 75 "
            "says that work is left."
        )
        | {"choices": list(MODES)},
    )
    snakemake_in_job: bool = field(
        default=False,
        metadata=_setting(
            "Start Snakemake inside every job, also for plain shell rules, whose command is otherwise the job itself."
        ),
    )
    keep_changed: bool = field(
        default=False,
        metadata=_setting(
            "Let a running job of an earlier call go on although its command has changed since. Otherwise it is "
            "cancelled and submitted anew, as a pending one always is."
        ),
    )
    array_limit: int = field(
        default=1000,
        metadata=_setting(
            "Jobs that ask for the same are submitted as arrays of at most so many, and never more than the cluster's "
            "MaxArraySize allows; 1: no arrays."
        ),
    )
    no_canary: bool = field(
        default=False,
        metadata=_setting(
            "Submit all jobs of a kind (resource `submit_kind`) at once. Otherwise one is submitted, and the others "
            "when one of that kind has been a success."
        ),
    )
    failure_limit: int = field(
        default=3,
        metadata=_setting(
            "When so many jobs of a kind failed alike, with no success of that kind in between, no more of it are "
            "submitted in this call; 0: never."
        ),
    )
    max_gpu_hours: Optional[float] = field(
        default=None,
        metadata=_setting(
            "GPU-hours that may be asked of SLURM for this folder, in all calls together: GPUs times time limit of "
            "every job, whether or not it took so long. What would go beyond is not submitted, and SLURM may not "
            "requeue jobs by itself."
        ),
    )
    keep_logs: bool = field(
        default=False,
        metadata=_setting("Keep scripts and logs of jobs that succeeded; those of others are always kept."),
    )
