"""DeepSpeed's compiled ops: which of them a run needs, and each built once before the runs of its hardware begin.

    python -m finetune_study.compiled RUN_YAML OP OUTPUT

builds one on a node of the hardware entry, with the entry's own Python, since an op depends on the node's processor
and on the versions there. It stays in the cache (places.opened), of which every run gets a copy; a run that finds none
there, because somebody emptied the cache, builds it itself, before it measures anything.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

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

LINES_OF_AN_ERROR = 30


def ops_of(run: Run) -> list[str]:
    """Ops that DeepSpeed compiles for a run: its Adam for states on the host, input and output of NVMe, and ZeRO++'s
    quantiser of what travels (deepspeed.runtime.zero.partition_parameters.CUDAQuantizer, and `all_to_all_quant_reduce`
    of deepspeed.runtime.comm.coalesced_collectives)."""
    return sorted({op for technique in run.parsed_techniques.values() for op in _ops(run, technique.name)})


def _ops(run: Run, name: str) -> Iterator[str]:
    part = run.parsed_techniques[name].deepspeed(run.hardware.device)
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
    script = f"from deepspeed.ops.op_builder import {BUILDERS[op]} as B; B().load(verbose=False)"
    started = time.monotonic()
    with places.opened(folders, run, results) as where:
        environment = variables.passed_on(os.environ) | where | variables.set_for(run, os.cpu_count() or 1, os.environ)
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
        )
        is_there = any(Path(where["TORCH_EXTENSIONS_DIR"]).glob(f"{op}/*.so"))
    if done.returncode or not is_there:
        said = (done.stderr or done.stdout).splitlines()[-LINES_OF_AN_ERROR:]
        raise RunFailedError(
            f"DeepSpeed's op `{op}` can't be compiled",
            where=f"hardware.{run.hardware.name}.software on {os.uname().nodename}",
            given="\n".join(said) or f"no library, and exit status {done.returncode}",
            do="give that environment a C++ compiler, ninja and CUDA's nvcc (`modules`, or a package of conda)",
        )
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds one of DeepSpeed's ops for the runs of a hardware entry.")
    parser.add_argument("run_yaml", type=Path, help="a run that needs it")
    parser.add_argument("op", choices=BUILDERS)
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
    say(f"{run.hardware.name}: DeepSpeed's {given.op} is built ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
