"""What the node said, against the config and against this machine: findings."""

import importlib.metadata
from typing import Any

from finetune_study import compiled
from finetune_study.doctor import node
from finetune_study.doctor.entries import Entry
from finetune_study.doctor.findings import Findings
from finetune_study.doctor.probe import LATENCY_SECONDS, Probe, exit_status
from finetune_study.doctor.rank import PACKAGES

GIB = 2**30

COMPARED = ("transformers", "datasets", "peft", "accelerate", "deepspeed")
"""What prepares models and data here and reads them there; torch may be another build."""

LITTLE_TEMPORARY_GIB = 1.0
"""torch, Triton and compilers write there: some hundred MB."""


STARTUP_SECONDS = 30.0
"""What an interpreter may take beside `startup_minutes`: SLURM's limit has a margin of minutes (MARGIN_MINUTES)."""


def judge(probe: Probe, entry: Entry, findings: Findings) -> None:
    """Findings about one of the entries that a job answers for."""
    if probe.problem:
        findings.wrong("job", probe.problem, probe.mend)
        return
    host = probe.facts.get("host")
    if host is None:
        _never_began(probe, entry, findings)
        return
    findings.ok("job", f"SLURM job {probe.slurm_id} on {host}, {probe.seconds:.0f} s from its submission to its end")
    _interpreter(probe, entry, findings)
    if "ended" not in probe.facts:
        findings.wrong(
            "node",
            f"the job broke off, with status {exit_status(probe)}: {_last_words(probe)}",
            f"its log is {probe.folder}/job.log",
        )
    _study_folder(probe, findings)
    _other_folders(probe, findings)
    _allocation(probe, entry, findings)
    if not _ran_out_of_memory(probe, entry, findings):
        _packages(probe, entry, findings)
        _packages_of_techniques(probe, entry, findings)
        _gpu(probe, entry, findings)
        _ranks(probe, entry, findings)
        _ops(probe, entry, findings)
    network = probe.facts.get("network", {})
    if network:
        reached = "can't be reached" if "error" in network else "can be reached"
        findings.ok("network", f"{network['host']} {reached} from the node; runs do not need it")


def judge_draft(probe: Probe, entry: Entry, findings: Findings) -> None:
    """Findings about GPUs that no entry describes: what the driver calls them."""
    if probe.problem:
        findings.warn("job", probe.problem, probe.mend)
    elif not probe.gpus:
        findings.warn("gpu", "nvidia-smi says nothing on the node", "fill in the description by hand")
    else:
        gpu = probe.gpus[0]
        findings.ok("gpu", f"{gpu['name']}, {gpu.get('memory_mib', '?')} MiB, {gpu.get('compute_capability', '?')}")


def _last_words(probe: Probe) -> str:
    lines = [line for line in probe.log.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "its log is empty"


def _software_key(entry: Entry) -> str:
    return f"hardware.{entry.name}.software"


def _never_began(probe: Probe, entry: Entry, findings: Findings) -> None:
    words = _last_words(probe)
    if "No module named 'finetune_study" in words or "No module named finetune_study" in words:
        found = "the interpreter starts, but this project is not installed in it"
    else:
        found = f"this project does not start there (status {exit_status(probe)}): {words}"
    findings.wrong(
        "software",
        found,
        f"install it with `pip install '<project>[training]'` into what {_software_key(entry)} names, or name another; "
        f"log: {probe.folder}/job.log",
    )


def _interpreter(probe: Probe, entry: Entry, findings: Findings) -> None:
    said, key = probe.facts, _software_key(entry)
    here = importlib.metadata.version("finetune-study")
    what = f"{said['executable']} (Python {said['python']}), finetune-study {said['version']}"
    if said["version"] != here or said["sources"] != node.sources_digest():
        findings.wrong(
            "software",
            f"{what}: not the code that is here ({here}), but that of {said['package']}",
            f"install this project again in {key}, best with `pip install --editable`",
        )
    elif said["startup_seconds"] > 60 * entry.hardware.slurm.startup_minutes + STARTUP_SECONDS:
        findings.warn(
            "software",
            f"{what}: took {said['startup_seconds']:.0f} s to start, more than startup_minutes allow",
            f"raise hardware.{entry.name}.slurm.startup_minutes, or put the software on a faster file system",
        )
    else:
        findings.ok("software", f"{what}; starts within {said['startup_seconds']:.0f} s")


def _study_folder(probe: Probe, findings: Findings) -> None:
    if "lock" not in probe.facts:
        return
    seen, lock = probe.facts["seen_after_seconds"], probe.facts["lock"]
    if seen is None:
        findings.wrong(
            "study folder",
            f"what the node writes is not seen here within {node.SEEN_SECONDS:.0f} s, or the other way round",
            "put the study on a file system that login node and nodes share",
        )
    elif seen > LATENCY_SECONDS:
        findings.warn(
            "study folder",
            f"seen from both sides, but only after {seen:.0f} s",
            f"set `latency-wait` in slurm/config.yaml to more than {seen:.0f}",
        )
    else:
        findings.ok("study folder", f"writable on the node; there and back within {seen:.1f} s")
    if lock == "held":
        findings.ok("locks", "a file locked here is locked on the node")
    elif lock == "free":
        findings.warn(
            "locks",
            "a file locked here is free on the node: locks are kept on each machine alone",
            "never call Snakemake for one study on two machines at a time; on Lustre the mount option is `flock`, not "
            "`localflock`",
        )
    else:
        findings.wrong("locks", f"flock fails on the node: {lock}", "put the study on another file system")


def _other_folders(probe: Probe, findings: Findings) -> None:
    temporary, home = probe.facts.get("temporary"), probe.facts.get("home")
    if temporary is None or home is None:
        return
    if "error" in temporary:
        findings.wrong(
            "temporary folder",
            f"{temporary['path']}: {temporary['error']}",
            "name another folder: hardware.<name>.places.temporary",
        )
    elif temporary["free_gib"] < LITTLE_TEMPORARY_GIB:
        found = f"{temporary['path']} has {temporary['free_gib']:.1f} GiB free"
        findings.warn("temporary folder", found, "name one with more room: hardware.<name>.places.temporary")
    else:
        findings.ok("temporary folder", f"{temporary['path']}, {temporary['free_gib']:.0f} GiB free")
    if "error" in home:
        findings.ok("home", f"{home['path']} can't be written to on the node, and need not be: {home['error']}")
    else:
        findings.ok("home", f"{home['path']} is writable on the node, {home['free_gib']:.0f} GiB free")


def _allocation(probe: Probe, entry: Entry, findings: Findings) -> None:
    said: dict[str, Any] = next((one for one in probe.facts.get("allocation", []) if one["entry"] == entry.name), {})
    if not said:
        return
    if "error" in said:
        lines = {key.strip(): words.strip() for key, _, words in (x.partition(":") for x in said["error"].splitlines())}
        what = said["error"].splitlines()[0]
        seen = "; ".join(f"{gpu['name']}, {gpu.get('memory_mib', '?')} MiB" for gpu in probe.gpus)
        findings.wrong("allocation", what + (f" (nvidia-smi: {seen})" if seen else ""), lines.get("do", ""))
        return
    found = ", ".join(f"{name} {_short(value)}" for name, value in said["found"].items() if value not in (None, []))
    limit = probe.facts.get("memory_limit_bytes")
    memory = f", memory limit {limit / GIB:.1f} GiB" if limit else ""
    findings.ok("allocation", f"as asked, by {said['by']}: {found or 'a node'}{memory}")


def _ran_out_of_memory(probe: Probe, entry: Entry, findings: Findings) -> bool:
    """Whether the kernel killed a rank that did nothing but start."""
    killed = [rank for rank, ending in enumerate(probe.facts.get("ranks", [])) if ending == "killed by SIGKILL"]
    if not (killed and probe.facts.get("oom_kills")):
        return False
    at = probe.ranks[killed[0]].get("at", "its start")
    findings.wrong(
        "host memory",
        f"the kernel killed rank {killed[0]} at `{at}`: the job's memory is too small to start training",
        f"raise hardware.{entry.name}.slurm.mem_gib_per_gpu",
    )
    return True


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(str(one["name"]) if isinstance(one, dict) else str(one) for one in value)
    return str(value)


def _packages(probe: Probe, entry: Entry, findings: Findings) -> None:
    first = probe.ranks[0]
    broken = {name: first[f"{name}_error"] for name in ("torch", *PACKAGES) if f"{name}_error" in first}
    silent = [name for name in ("torch", *PACKAGES) if name not in first and name not in broken]
    if broken or silent:
        how = "; ".join(f"{name}: {error}" for name, error in broken.items())
        if silent:
            ending = (probe.facts.get("ranks") or ["unknown"])[0]
            how += f"{'; ' if how else ''}rank 0 came as far as `{first.get('at', 'nothing')}` ({ending})"
        findings.wrong(
            "packages",
            how,
            f"install the project with its extra in {_software_key(entry)}: `pip install '<project>[training]'`, or "
            f"`make gpu-env`; log: {probe.folder}/job.log",
        )
        return
    torch = first["torch"]
    cuda = f" for CUDA {torch['cuda']}" if torch["cuda"] else " without CUDA"
    seconds = sum(first[name]["import_seconds"] for name in ("torch", *PACKAGES))
    found = f"torch {torch['version']}{cuda}; imports take {seconds:.0f} s"
    others = _other_versions(first)
    if others:
        findings.warn(
            "packages",
            f"{found}; not the versions that prepare models and data here: {', '.join(others)}",
            f"install the same in {_software_key(entry)}: `make gpu-env` takes them from envs/local.lock",
        )
    else:
        names = ", ".join(f"{name} {first[name]['version']}" for name in PACKAGES)
        findings.ok("packages", f"{found}; {names}")


def _packages_of_techniques(probe: Probe, entry: Entry, findings: Findings) -> None:
    first = probe.ranks[0]
    told = [name for name in entry.packages_needed if name in first]
    lacking = {name: first[f"{name}_error"] for name in entry.packages_needed if f"{name}_error" in first}
    found = "; ".join(f"`{entry.packages_needed[name]}` needs `{name}`: {error}" for name, error in lacking.items())
    if lacking and lacking.keys() <= compiled.PACKAGES.keys() and first.get("ops", {}).get("tools", {}).get("nvcc"):
        findings.warn(
            "packages of techniques",
            found,
            f"nothing: `prepare` compiles it in a job there, which may take an hour; or install it in "
            f"{_software_key(entry)} (envs/README.md)",
        )
    elif lacking:
        findings.wrong(
            "packages of techniques",
            found,
            f"install it in {_software_key(entry)}, or take the technique out of the recipes; docs/techniques.md says "
            "which package each needs",
        )
    elif told:
        versions = (f"{name} {first[name]['version'] or ''}".rstrip() for name in told)
        findings.ok("packages of techniques", ", ".join(versions))


def _other_versions(first: dict[str, Any]) -> list[str]:
    """Packages that are installed here in another version than there."""
    others = []
    for name in COMPARED:
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if first[name]["version"] != here:
            others.append(f"{name} {first[name]['version']} ({here} here)")
    return others


def _gpu(probe: Probe, entry: Entry, findings: Findings) -> None:
    if entry.hardware.device != "cuda":
        return
    driver = {gpu["driver"] for gpu in probe.gpus if "driver" in gpu}
    said = f"driver {', '.join(sorted(driver))}" if driver else "nvidia-smi says nothing"
    failures = [(n, rank["gpu_error"]) for n, rank in enumerate(probe.ranks) if "gpu_error" in rank]
    if failures:
        number, error = failures[0]
        findings.wrong(
            "gpu",
            f"torch can't use the GPU of rank {number}: {error} ({said})",
            f"take a build of torch for this driver and GPU in {_software_key(entry)}: a V100 needs CUDA 12 "
            "(envs/README.md), and a driver knows no CUDA newer than `nvidia-smi` prints",
        )
        return
    gpus = [rank["gpu"] for rank in probe.ranks if "gpu" in rank]
    if not gpus:
        return
    found = f"{gpus[0]['name']}, {gpus[0]['memory_bytes'] / GIB:.1f} GiB, {gpus[0]['compute_capability']}; {said}"
    asked = entry.hardware.compute_capability
    others = {
        gpu["compute_capability"] for gpu in gpus if asked is not None and float(gpu["compute_capability"]) != asked
    }
    if others:
        findings.wrong(
            "gpu",
            f"compute capability {', '.join(sorted(others))} ({found}), not {asked}",
            f"set hardware.{entry.name}.compute_capability: {min(others)}",
        )
    elif asked is None or entry.hardware.gpu is None:
        known = f"gpu: {gpus[0]['name']}, compute_capability: {gpus[0]['compute_capability']}"
        findings.warn("gpu", f"{found}; the config leaves open what it is", f"set in hardware.{entry.name} {known}")
    else:
        findings.ok("gpu", found)


def _ranks(probe: Probe, entry: Entry, findings: Findings) -> None:
    failures = [(n, rank["all_reduce_error"]) for n, rank in enumerate(probe.ranks) if "all_reduce_error" in rank]
    stuck = [n for n, rank in enumerate(probe.ranks) if "torch" in rank and rank.get("at") == "all_reduce"]
    stuck = [n for n in stuck if not {"all_reduce", "all_reduce_error"} & probe.ranks[n].keys()]
    backend = "NCCL" if entry.hardware.device == "cuda" else "gloo"
    if failures or stuck:
        number, error = failures[0] if failures else (stuck[0], "no end")
        findings.wrong(
            "ranks",
            f"{probe.num_gpus} ranks can't talk by {backend}; rank {number}: {error}",
            f"name the interface between them in hardware.{entry.name}.environment ({backend.upper()}_SOCKET_IFNAME); "
            f"for NCCL NCCL_DEBUG: INFO says more in {probe.folder}/job.log",
        )
        return
    said = probe.ranks[0].get("all_reduce")
    if said is None:
        return  # torch is missing, or the GPU: told already
    version = f" {said['version']}" if said["version"] else ""
    if said["ranks"] == 1:
        findings.ok("ranks", f"one rank, {backend}{version} starts; nothing to talk to")
    else:
        rate = said["gigabytes_per_second"]
        findings.ok("ranks", f"{said['ranks']} ranks, {backend}{version}, all_reduce at {rate:g} GB/s (bus bandwidth)")


def _ops(probe: Probe, entry: Entry, findings: Findings) -> None:
    if entry.hardware.device != "cuda":
        return  # there torch's own AdamW does that work
    first = probe.ranks[0]
    said, error = first.get("ops"), first.get("ops_error")
    if said is None and error is None:
        return
    mend = (
        f"give {_software_key(entry)} a C++ compiler, ninja and CUDA's nvcc (`modules`), or take offload_optimizer "
        "out of the recipes"
    )
    if said is not None and "load_seconds" in said:
        findings.ok("compiled ops", f"DeepSpeed's CPU Adam is built and loaded, in {said['load_seconds']} s")
        return
    lacking = [name for name, path in said["tools"].items() if path is None] if said else []
    why = error or (said and said["why_not"]) or (f"not on PATH: {', '.join(lacking)}" if lacking else "")
    if entry.uses_offload:
        findings.wrong("compiled ops", f"the study's offload_optimizer needs DeepSpeed's CPU Adam: {why}", mend)
    elif why:
        findings.warn("compiled ops", f"only offload_optimizer needs DeepSpeed's CPU Adam: {why}", mend)
    else:
        findings.ok("compiled ops", "DeepSpeed's CPU Adam can be built; only offload_optimizer needs it")
