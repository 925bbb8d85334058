"""Ranks that stay up and train one run after another: libraries are imported once, the process group is made once.

What a run leaves in the process is put back after it. Runs that are measured, or end badly on purpose, have processes
of their own (tests/training/lab.py).
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_study import facts, variables
from finetune_study import run as run_module
from finetune_study.paths import Results, RunPaths
from finetune_study.ranks import free_port
from finetune_study.run import Run
from tests.training import fsdp_on_cpu
from tests.training.lab import LIMIT_SECONDS

ANSWER = "pool: "
"""How a line begins that is an answer; libraries print too."""


@dataclass(frozen=True)
class Answer:
    """How a run ended in the pool."""

    error: str | None
    """`Type: message` of the first rank that failed; None where all did their work."""
    trace: str
    ranks: list[dict[str, Any]]
    """Facts of each rank."""

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.ranks[0]["steps"]]

    @property
    def eval_losses(self) -> list[float]:
        return [self.ranks[0]["evaluations"][when] for when in ("before", "after")]


class Pool:
    """As many ranks as devices."""

    def __init__(self, size: int, is_distributed: bool, run: Run, log: Path) -> None:
        """
        Args:
            size: ranks.
            is_distributed: they have a process group; a run of one device has none, unless DeepSpeed asks for one.
            run: any run of the hardware that all runs are for.
            log: takes what the ranks print.
        """
        self.size, self._is_distributed, self._run, self._log = size, is_distributed, run, log
        self._ranks: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.communicate()
        self._ranks = []

    def train(self, run: Run, paths: RunPaths, results: Results, is_compiled: bool = True) -> Answer:
        """Trains a run that is prepared; without `is_compiled` torch.compile, which torchao's optimizers call, is idle.

        After an error the ranks start anew, since peers may wait for each other.
        """
        assert run.num_gpus == self.size
        if not self._ranks:
            self._start()
        for number, rank in enumerate(self._ranks):
            paths.rank_facts(number).unlink(missing_ok=True)
            paths.rank_facts(number).parent.mkdir(parents=True, exist_ok=True)
            assert rank.stdin is not None
            order = {
                "run": str(paths.run_yaml),
                "results": str(results.root),
                "facts": str(paths.rank_facts(number)),
                "is_compiled": is_compiled,
            }
            rank.stdin.write(json.dumps(order) + "\n")
            rank.stdin.flush()
        answers = [self._answer(rank) for rank in self._ranks[:1]]
        if answers[0]["error"] is None:
            answers += [self._answer(rank) for rank in self._ranks[1:]]
        failed = next((answer for answer in answers if answer["error"]), {"error": None, "trace": ""})
        if failed["error"] is not None:
            self.stop()
        told = [facts.read(paths.rank_facts(number)) for number in range(self.size)]
        return Answer(failed["error"], str(failed["trace"]), told)

    def _start(self) -> None:
        threads = variables.threads_of_rank(self.size, os.environ)
        chosen = variables.passed_on(os.environ) | variables.set_for(self._run, threads, os.environ)
        chosen["PYTHONPATH"] = str(Path(__file__).parents[2])
        master = ("127.0.0.1", free_port())
        with self._log.open("a", encoding="utf-8") as log:
            for number in range(self.size):
                place = variables.for_rank(number, self.size, self.size, master) if self._is_distributed else {}
                self._ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.training.pool"],
                        env=chosen | place,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                    )
                )

    def _answer(self, rank: "subprocess.Popen[str]") -> dict[str, Any]:
        assert rank.stdout is not None
        for line in rank.stdout:
            if line.startswith(ANSWER):
                answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return answer
        return {
            "error": f"the rank ended with status {rank.wait(LIMIT_SECONDS)}",
            "trace": self._log.read_text()[-2000:],
        }


def _obey(order: dict[str, Any]) -> dict[str, Any]:
    """One run in this process."""
    import torch

    from finetune_study.facts import Facts
    from finetune_study.train import Rank

    rank = None
    before = dict(os.environ)
    torch.compiler.set_stance("default" if order["is_compiled"] else "force_eager")
    try:
        rank = Rank(run_module.load(Path(order["run"])), Facts(Path(order["facts"])))
        rank.train(Results(Path(order["results"])))
        return {"error": None, "trace": ""}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    finally:
        if rank is not None:
            with contextlib.suppress(RuntimeError):  # it ended before its meter was started
                rank.memory.close()
        del rank
        os.environ.clear()
        os.environ.update(before)
        _forget()


def _forget() -> None:
    """What transformers, accelerate, DeepSpeed, bitsandbytes and torch keep of a run for the whole process."""
    import bitsandbytes
    import deepspeed
    import torch
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    bitsandbytes.optim.GlobalOptimManager._instance = None
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    torch._dynamo.reset()
    gc.collect()


def main() -> None:
    fsdp_on_cpu.allow()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log
    for line in sys.stdin:
        print(ANSWER + json.dumps(_obey(json.loads(line))), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
