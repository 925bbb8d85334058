"""What is compiled for the runs of a hardware entry: DeepSpeed's ops and flash-attn, each built once before they begin.

    python -m finetune_study.compiled RUN_YAML OP OUTPUT

builds one on a node of the hardware entry, with the entry's own Python, since it depends on the node's processor and on
the versions there. DeepSpeed's ops stay in the cache (places.opened), of which every run gets a copy; a run that finds
none there, because somebody emptied the cache, builds it itself, before it measures anything. flash-attn is compiled
where the environment has none, from its source (no library that somebody else compiled takes its place), and stays
with what else was prepared.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from finetune_study import places, variables
from finetune_study import run as run_module
from finetune_study.config import Places
from finetune_study.errors import RunFailedError, StudyError
from finetune_study.paths import Results
from finetune_study.prepared import say
from finetune_study.record import write_atomically
from finetune_study.run import Run

BUILDERS = {"cpu_adam": "CPUAdamBuilder", "async_io": "AsyncIOBuilder", "quantizer": "QuantizerBuilder"}
"""Classes of deepspeed.ops.op_builder by the names of their ops."""

PACKAGES = {"flash_attn": ("flash-attn", "einops")}
"""Packages of techniques that are compiled for torch of the environment, by the names of their imports, with what they
need beside torch."""
USED = {"flash_attn": "flash_attn.bert_padding"}
"""What transformers imports of them (modeling_flash_attention_utils.py) that needs the most."""
GIB_PER_COMPILER = 9
"""Memory that each of flash-attn's compilers takes (setup.py of flash-attn 2.8, NinjaBuildExtension)."""

LINES_OF_AN_ERROR = 30


def ops_of(run: Run) -> list[str]:
    """What is compiled for a run: of DeepSpeed its Adam for states on the host, input and output of NVMe, and ZeRO++'s
    quantiser of what travels (deepspeed.runtime.zero.partition_parameters.CUDAQuantizer, and `all_to_all_quant_reduce`
    of deepspeed.runtime.comm.coalesced_collectives); and the package of FlashAttention-2."""
    return sorted({op for technique in run.parsed_techniques.values() for op in _ops(run, technique.name)})


def _ops(run: Run, name: str) -> Iterator[str]:
    technique = run.parsed_techniques[name]
    yield from (package for package in technique.packages_needed() if package in PACKAGES)
    part = technique.deepspeed(run.hardware.device)
    zero = part.get("zero_optimization", {})
    offloads = [zero.get(f"offload_{what}") for what in ("optimizer", "param")]
    devices = {offload["device"] for offload in offloads if offload}
    if devices and "optimizer" in part:
        yield "cpu_adam"
    if "nvme" in devices:
        yield "async_io"
    if any(zero.get(f"zero_quantized_{what}") for what in ("weights", "gradients")):
        yield "quantizer"


def build(run: Run, op: str, results: Results, folders: Places) -> float:
    """Builds an op, unless it is there already; how long that took, in seconds.

    Args:
        run: one that needs it, or any other on that hardware.
        op: its name.
        results: the study's, with the cache where no other is named.
        folders: where cache and temporary files lie.

    Raises:
        RunFailedError: where it can't be built, with what the compiler said.
    """
    started = time.monotonic()
    with places.opened(folders, run, results) as where:
        if op in PACKAGES:
            _package(run, op, where, results)
        else:
            _deepspeed_op(run, op, where)
    return time.monotonic() - started


def _deepspeed_op(run: Run, op: str, where: dict[str, str]) -> None:
    script = f"from deepspeed.ops.op_builder import {BUILDERS[op]} as B; B().load(verbose=False)"
    environment = variables.passed_on(os.environ) | where | variables.set_for(run, os.cpu_count() or 1, os.environ)
    done = _python(["-c", script], environment)
    if done.returncode or not any(Path(where["TORCH_EXTENSIONS_DIR"]).glob(f"{op}/*.so")):
        raise _not_built(run, f"DeepSpeed's op `{op}` can't be compiled", done)


def _package(run: Run, name: str, where: dict[str, str], results: Results) -> None:
    """Compiles a package for the runs of an entry, unless its environment or an earlier call has one to import."""
    environment = dict(os.environ) | where  # pip is the user's: its index and proxies are in variables, too
    used = ["-c", f"import {USED[name]}"]
    if _python(used, environment).returncode == 0:
        return
    built, (package, *_) = Path(where["TMPDIR"]) / name, PACKAGES[name]
    # With the environment's own torch, for which it is compiled: pip would fetch another one, to build and beside it.
    given = ["--quiet", "--no-build-isolation", "--no-deps", "--no-binary", package, "--target", str(built)]
    done = _python(["-m", "pip", "install", *given, *map(_requirement, PACKAGES[name])], environment | _flags())
    if done.returncode == 0:
        done = _python(used, environment | {"PYTHONPATH": str(built)})
    if done.returncode:
        raise _not_built(run, f"The package {package} is not there, and can't be compiled", done)
    places.keep_package(built, run, results)


def _requirement(package: str) -> str:
    """Name and versions, as this project's extra `kernels` has them."""
    ours = map(Requirement, importlib.metadata.requires("finetune-study") or [])
    return next(f"{one.name}{one.specifier}" for one in ours if one.name == package)


def _flags() -> dict[str, str]:
    """How flash-attn is built (its setup.py): from source, for this node's GPU alone, with as many compilers as fit."""
    allotted = int(os.environ.get("SLURM_MEM_PER_NODE") or 0) / 1024  # MiB
    memory = allotted or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    jobs = max(1, min(len(os.sched_getaffinity(0)), int(memory / GIB_PER_COMPILER)))
    generation = _python(["-c", "import torch; print(torch.cuda.get_device_capability()[0])"], dict(os.environ))
    # Kernels for 8.0 run on all of its generation.
    architecture = {} if generation.returncode else {"FLASH_ATTN_CUDA_ARCHS": f"{generation.stdout.strip()}0"}
    return {"FLASH_ATTENTION_FORCE_BUILD": "TRUE", "MAX_JOBS": str(jobs)} | architecture


def _python(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def _not_built(run: Run, what: str, done: subprocess.CompletedProcess[str]) -> RunFailedError:
    said = (done.stderr or done.stdout).splitlines()[-LINES_OF_AN_ERROR:]
    return RunFailedError(
        what,
        where=f"hardware.{run.hardware.name}.software on {os.uname().nodename}",
        given="\n".join(said) or f"no library, and exit status {done.returncode}",
        do="give that environment a C++ compiler, ninja and CUDA's nvcc (`modules`, or a package of conda); a package "
        "may also be installed there by hand (envs/README.md)",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Builds an op of DeepSpeed or a package for the runs of a hardware entry."
    )
    parser.add_argument("run_yaml", type=Path, help="a run that needs it")
    parser.add_argument("op", choices=[*BUILDERS, *PACKAGES])
    parser.add_argument("output", type=Path, help="says that it is built")
    parser.add_argument("--cache")
    parser.add_argument("--temporary")
    given = parser.parse_args()
    folders = Places(cache=given.cache, temporary=given.temporary)
    try:
        run = run_module.load(given.run_yaml)
        seconds = build(run, given.op, Results.of_run_yaml(given.run_yaml), folders)
    except StudyError as error:
        raise SystemExit(str(error)) from None
    write_atomically(given.output, json.dumps({"op": given.op, "seconds": round(seconds, 1)}) + "\n")
    say(f"{run.hardware.name}: {given.op} is there ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
