"""What can be seen from where Snakemake will run: SLURM's commands and accounting, folders, the model hub."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from finetune_study import software
from finetune_study.config import Config
from finetune_study.doctor import scheduler
from finetune_study.doctor.entries import Entry
from finetune_study.doctor.findings import Findings
from finetune_study.doctor.scheduler import COMMANDS, Cluster, SchedulerError
from finetune_study.paths import Results
from finetune_study.prepared import read_manifest
from finetune_study.run import Run

HUB = "https://huggingface.co"
"""Where models and data sets come from, unless HF_ENDPOINT names a mirror (huggingface_hub does the same)."""

HUB_SECONDS = 10.0

MUCH_GIB, LITTLE_GIB = 20.0, 1.0
"""Free space: weights of a model of 7B parameters in 16 bits take 13 GiB; the demo in all takes 0.5 (README)."""

GIB = 2**30


def slurm(findings: Findings) -> Cluster | None:
    """Whether SLURM is there and answers, and what it says of itself; None where nothing more can be asked."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        findings.wrong(
            "commands",
            f"not on PATH: {', '.join(missing)}",
            "call the doctor on a login node of the cluster; some need `module load slurm` there",
        )
        return None
    try:
        cluster = scheduler.look()
    except SchedulerError as error:
        findings.wrong("controller", str(error), "SLURM's controller must answer (`scontrol ping`): try again later")
        return None
    findings.ok("controller", f"SLURM {cluster.version}, cluster `{cluster.name}`")
    if not cluster.has_accounting:
        findings.warn(
            "accounting",
            "this cluster keeps none",
            "runs are followed by squeue; what SLURM killed for memory or time may then look like a failure",
        )
    else:
        try:
            cluster = scheduler.look_up_accounting(cluster)
            findings.ok("accounting", f"answers; your accounts: {', '.join(cluster.accounts) or 'none'}")
        except SchedulerError as error:
            findings.wrong(
                "accounting",
                str(error),
                "`sacct` and `sacctmgr show assoc` must answer, jobs are followed there: tell your administrators",
            )
    _configuration(cluster, findings)
    return cluster


def _configuration(cluster: Cluster, findings: Findings) -> None:
    config = cluster.config
    numbers = ", ".join(f"{key} {config[key]}" for key in ("MaxJobCount", "MaxArraySize") if key in config)
    findings.ok("cluster", f"{numbers}; EnforcePartLimits {config.get('EnforcePartLimits', 'unknown')}")
    constrains = config.get("ConstrainRAMSpace")
    if constrains is not None and constrains.lower() != "yes":
        findings.warn(
            "memory limit",
            "SLURM does not hold jobs to the memory that they ask for (ConstrainRAMSpace=no)",
            "nothing for you to do: a run that takes more goes on, and what it takes is missing to its neighbours",
        )
    elif constrains is not None:
        findings.ok("memory limit", "SLURM holds jobs to the memory that they ask for: host_oom is an outcome")


# --- folders ---------------------------------------------------------------------------------------------------------


def folders(results: Results, findings: Findings) -> bool:
    """Whether results can be written here: files, locks, room."""
    place = results.doctor
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place) as file:
            file.write(b"x")
            file.flush()
            findings.ok("results", f"{results.root.absolute()} is writable ({_file_system(place)})")
            _locks(Path(file.name), findings)
        free = shutil.disk_usage(place).free / GIB
    except OSError as error:
        findings.wrong(
            "results",
            f"{results.root.absolute()} can't be written to: {error.strerror}",
            "make it writable for you, or work in another folder; a full quota (`quota -s`) looks like this as well",
        )
        return False
    if free < LITTLE_GIB:
        findings.wrong("free space", f"{free:.1f} GiB", "make room: models, data and records go below results/")
    elif free < MUCH_GIB:
        findings.warn("free space", f"{free:.1f} GiB", "a model of 7B parameters takes 13 GiB: make room, if need be")
    else:
        findings.ok("free space", f"{free:.0f} GiB (a quota may allow less)")
    return True


def _locks(path: Path, findings: Findings) -> None:
    """flock(2), as the executor and each run use it."""
    with path.open("rb") as one, path.open("rb") as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            findings.ok("locks", "files can be locked (flock)")
            return
        except OSError as error:
            given = error.strerror
        else:
            given = "two locks on one file at a time"
    findings.wrong(
        "locks",
        f"flock does not work on the file system of {path.parent}: {given}",
        "put the study on another one; on Lustre the mount option `flock` switches it on",
    )


def _file_system(place: Path) -> str:
    """Type of the file system that holds a folder, as /proc/mounts calls it."""
    best = ("", "unknown file system")
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
            _, mount, kind, *_ = line.split()
            if place.absolute().is_relative_to(mount) and len(mount) > len(best[0]):
                best = (mount, kind)
    return best[1]


# --- software and hub ------------------------------------------------------------------------------------------------


def entry_software(entry: Entry, findings: Findings) -> None:
    """Interpreter and image that an entry names by their path."""
    for key, path in software.missing(entry.hardware.software).items():
        findings.wrong(
            "software",
            f"there is no {path}",
            f"set hardware.{entry.name}.software.{key}; `make gpu-env` makes .venv-gpu (envs/README.md)",
        )


def hub(config: Config, entries: Iterable[Entry], results: Results, findings: Findings) -> None:
    """Whether what is not prepared yet can be fetched from here."""
    missing = _not_prepared(config, [run for entry in entries for run in entry.runs], results)
    without = [name for name, has_other_source in missing.items() if not has_other_source]
    endpoint = os.environ.get("HF_ENDPOINT") or HUB
    problem = _why_not(endpoint)
    if problem is None:
        needed = f"; still to fetch: {', '.join(missing)}" if missing else "; nothing is to be fetched"
        findings.ok("hub", f"{endpoint} answers{needed}")
    elif without:
        findings.wrong(
            "hub",
            f"{problem}, and not prepared yet: {', '.join(without)}",
            "call `snakemake --cores 2 prepare` where the hub can be reached and this "
            "folder is seen; or name a local folder in models.<name>.name_or_path; or set HTTPS_PROXY or HF_ENDPOINT",
        )
    else:
        rest = (
            f"{', '.join(missing)} can come from the package index" if missing else "nothing is to be fetched from it"
        )
        findings.warn(
            "hub",
            f"{problem}; {rest}",
            "nothing to do for this study; for another model set HTTPS_PROXY or HF_ENDPOINT, or name a local folder",
        )


def _not_prepared(config: Config, runs: Iterable[Run], results: Results) -> dict[str, bool]:
    """What comes from a hub and is not here yet: whether there is another source for it."""
    missing: dict[str, bool] = {}
    for run in runs:
        for model, key in ((run.model, run.model_key), (run.tokenizer, run.tokenizer_key)):
            name = model.name_or_path
            if name and not _is_here(name) and read_manifest(results.model(key)) is None:
                missing[name] = model.wheel is not None
        dataset = config.data.dataset
        if dataset != "generated" and not _is_here(dataset) and read_manifest(results.data(run.data_key)) is None:
            missing[dataset] = False
    return missing


def _is_here(name: str) -> bool:
    return Path(name).expanduser().exists()


def _why_not(endpoint: str) -> str | None:
    """Why a hub can't be reached; None when it answers, whatever it says."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set"
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return f"{endpoint} can't be reached from here ({getattr(error, 'reason', error)})"
