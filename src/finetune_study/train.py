"""One rank of a run: THE training loop, one for every technique.

Order of application, fixed here and nowhere else:

1. `TrainingArguments` with the arguments of all techniques (ZeRO-3 must be known before there is a model),
2. the model, in the dtype and with the attention of the recipe,
3. wrappers in the order of `techniques.ORDER`: peft, then checkpointing's input hook,
4. transformers.Trainer, which shards, offloads and makes the optimizer when training starts.

The supervisor, finetune_study.launch, starts one such process per rank.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from finetune_study import oom
from finetune_study import run as run_module
from finetune_study.config import merge
from finetune_study.errors import RunFailedError
from finetune_study.facts import Facts
from finetune_study.measure import environment
from finetune_study.measure.memory import CudaMemoryMeter, DataMemoryMeter, peak_rss_bytes
from finetune_study.measure.phases import Phases
from finetune_study.paths import Results
from finetune_study.run import Run
from finetune_study.sequences import IGNORED
from finetune_study.techniques.joined import bare
from finetune_study.techniques.precision import is_deepspeed

GIB = 2**30

EXIT_OUT_OF_MEMORY = 77
"""Exit status of a rank that has written down how it ran out of memory."""
EXIT_ERROR = 70
"""Exit status of a rank that has written down any other error (EX_SOFTWARE of sysexits.h)."""

GLOO_TIMEOUT_SECONDS = 600
"""A rank that waits longer for its peers will wait for ever; the supervisor has ended it long before."""


class Rank:
    """One process of a run, with its instruments."""

    def __init__(self, run: Run, facts: Facts, memory_snapshot: Path | None = None) -> None:
        """
        Args:
            run: what to do.
            facts: where to tell what happens.
            memory_snapshot: where the CUDA allocator's history goes when memory runs out; None: nowhere.
        """
        self.run, self.facts, self.memory_snapshot = run, facts, memory_snapshot
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.step = 0
        self.phases = Phases()
        budget = run.hardware.memory_budget_gib
        self.memory: DataMemoryMeter | CudaMemoryMeter = (
            CudaMemoryMeter(self.phases, keep_history=memory_snapshot is not None)
            if run.hardware.device == "cuda"
            else DataMemoryMeter(self.phases, None if budget is None else int(budget * GIB))
        )

    def say(self, line: str) -> None:
        """Progress, from one rank alone."""
        if self.rank == 0:
            print(line, flush=True)

    def train(self, results: Results) -> None:
        """Runs the whole protocol and tells the facts.

        Raises:
            Exception: whatever torch and the libraries raise; `main` writes it down.
        """
        run = self.run
        self._check_device()
        self._check_packages()
        self.say(f"{run.run_id}: starting on {run.hardware.name} x {self.world_size}")
        with tempfile.TemporaryDirectory() as scratch:
            arguments = training_arguments(run, scratch)
            assert arguments.n_gpu <= 1, "one process drives one device"
            assert arguments.world_size == run.num_gpus == self.world_size
            self._warm_up(arguments)
            self.memory.start()
            self.facts.tell(startup_seconds=_seconds_since_start(), device_ready=True)
            if self.rank == 0:
                self.facts.tell(environment=environment.describe(run.hardware.device))
            self.facts.tell(affinity=sorted(os.sched_getaffinity(0)))
            started, resident = time.perf_counter(), peak_rss_bytes()
            model = self._model(results)
            self.facts.tell(
                load_seconds=time.perf_counter() - started,
                load_peak_rss_growth_bytes=peak_rss_bytes() - resident,
            )
            self._fit(arguments, model, results)

    def _check_device(self) -> None:
        """Before anything is measured: torch can use the device; which one it is, the supervisor has seen.

        Raises:
            RunFailedError: otherwise; nothing is measured on something else.
        """
        import torch

        if self.run.hardware.device == "cuda" and not torch.cuda.is_available():
            raise RunFailedError(
                "torch can't use the GPU",
                where=f"hardware.{self.run.hardware.name}.software",
                given=f"torch {torch.__version__}, built for CUDA {torch.version.cuda}",
                allowed="a build for this driver and this GPU; a V100 needs one for CUDA 12.6",
                do="name a Python with such a build in the entry's `software`; envs/README.md says how to make one",
            )

    def _check_packages(self) -> None:
        """Nothing is replaced silently: without its package a technique is not run at all.

        Raises:
            RunFailedError: naming technique and package.
        """
        for name, technique in self.run.parsed_techniques.items():
            for package in technique.packages_needed():
                if not _is_importable(package):
                    raise RunFailedError(
                        f"`{name}` needs the package `{package}`, which this Python does not have",
                        where=f"hardware.{self.run.hardware.name}.software",
                        given=sys.executable,
                        do="install it there, or take the technique out of the recipe; docs/techniques.md says more. "
                        "What `prepare` compiled for other versions of Python or torch, it compiles again once "
                        "results/prepared/ops is deleted",
                    )

    def _warm_up(self, arguments: Any) -> None:
        """All that takes memory once and is not the model's: libraries, threads, process group, context."""
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import torch
        import transformers
        from transformers import Trainer  # noqa: F401

        transformers.set_seed(self.run.seed)
        transformers.utils.logging.disable_progress_bar()
        device = arguments.device
        square = torch.ones(512, 512, device=device, requires_grad=True)
        (square @ square).sum().backward()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(square.detach())
        self._synchronize()

    def _synchronize(self) -> None:
        import torch

        if self.run.hardware.device == "cuda":
            torch.cuda.synchronize()

    def _model(self, results: Results) -> Any:
        from finetune_study import model as model_module
        from finetune_study.techniques import quantised

        model = model_module.load(self.run, results.model(self.run.model_key))
        if getattr(model, "is_quantized", False) and (warning := quantised.by_bitsandbytes(model).warning()):
            self.say(f"warning: {warning}")
        for technique in self.run.parsed_techniques.values():
            model = technique.wrap(model, self.run)
        trained, total = model_module.count_weights(model)
        self.facts.tell(
            total_parameters=total,
            trainable_parameters=trained,
            attention_implementation=model.config._attn_implementation,
        )
        self.say(f"model loaded: {trained:,} of {total:,} weights trained")
        return model

    def _fit(self, arguments: Any, model: Any, results: Results) -> None:
        from transformers import PrinterCallback, Trainer

        from finetune_study import data
        from finetune_study import model as model_module
        from finetune_study.measure.energy import EnergyMeter
        from finetune_study.measure.flops import model_flops
        from finetune_study.measure.steps import StepMeter, flattens

        run = self.run
        train_data, eval_data = data.load(results.data(run.data_key))
        sequences = run.training.effective_batch_size // run.num_gpus
        self.facts.tell(model_flops_per_step=model_flops(model, run.sequence_length, sequences))
        uuid = environment.gpu_uuid() if run.hardware.device == "cuda" else None
        energy = EnergyMeter(uuid)
        steps = StepMeter(
            run.protocol.num_untimed_steps,
            run.protocol.num_timed_steps,
            self._synchronize,
            lambda: _was_skipped(trainer),
            lambda entry: self._on_step(entry, steps.num_stepped),
        )

        class StudyTrainer(Trainer):
            def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
                # max_steps leaves room for skipped steps; the schedule is that of the steps that count.
                return super().create_scheduler(run.num_steps, optimizer)

        techniques = run.parsed_techniques.values()
        trainer = StudyTrainer(
            model=model,
            args=arguments,
            train_dataset=train_data,
            data_collator=steps.collate,
            optimizer_cls_and_kwargs=next((made for t in techniques if (made := t.optimizer(run, arguments))), None),
        )

        def on_timing(begins: bool) -> None:
            self.memory.pace(timed=begins)
            if begins:
                energy.start()
                return
            energy.stop()
            self.facts.tell(gpu_state=environment.gpu_state(uuid))

        def follow_model() -> None:
            # As the trainer wrapped it: what these hooks do is outside of what torch.compile compiles.
            trainer.model_wrapped.register_forward_pre_hook(steps.count)
            self.phases.follow_model(trainer.model_wrapped)

        steps.on_timing = on_timing
        steps.flattens = flattens(model)
        evaluation = _Evaluation(self, trainer, eval_data, results.model(run.tokenizer_key))
        trainer.remove_callback(PrinterCallback)  # we say the same in better words
        trainer.add_callback(steps)
        trainer.add_callback(_when_training_begins(follow_model))
        trainer.add_callback(evaluation.callback())
        if model.config._attn_implementation == "sdpa":
            # After the evaluation before training: without gradients torch may choose another kernel.
            probe = partial(
                model_module.attention_kernel_probe, lambda kernel: self.facts.tell(attention_kernel=kernel)
            )
            trainer.add_callback(_when_training_begins(probe))
        for callback in (each for technique in techniques for each in technique.callbacks(model)):
            trainer.add_callback(callback)
        model_module.compute_dtype_probe(model, lambda dtype: self.facts.tell(compute_dtype=dtype))
        trainer.train()
        if steps.num_stepped < run.num_steps:
            raise RunFailedError(
                "Too many steps changed nothing: loss scaling skipped them",
                given=f"{steps.num_stepped} of {run.num_steps} steps",
                do="use bf16, a lower learning_rate, or weights that fit the range of fp16",
            )
        self.facts.tell(
            memory=self.memory.report(),
            energy_joules=energy.joules,
            **_optimizer_facts(trainer),
        )

    def _on_step(self, entry: dict[str, Any], num_stepped: int) -> None:
        self.facts.append("steps", entry)
        self.facts.tell(memory=self.memory.report())
        kind = "timed" if entry["timed"] else "untimed" if entry["stepped"] else "skipped by loss scaling"
        self.say(
            f"step {num_stepped + (not entry['stepped'])} of {self.run.num_steps}: "  # a skipped one is tried again
            f"{entry['seconds']:.3f} s ({kind}), loss {_show(entry['loss'])}"
        )
        self.step = entry["step"] + 1

    def tell_out_of_memory(self, found: oom.OutOfMemory) -> None:
        """Writes down which memory ran out, and where."""
        self.memory.lift_budget()
        held = found.bytes_allocated or self.memory.held_bytes_when_refused(found.bytes_requested)
        on_device = found.on_device or self.run.hardware.memory_budget_gib is not None
        facts: dict[str, Any] = {
            "reason": found.message.splitlines()[0],
            "phase": self.phases.current,
            "step": self.step,
            "bytes_requested": found.bytes_requested,
            "bytes_held": held,
        }
        if self.run.hardware.device == "cuda" and on_device:
            facts |= self._allocator_facts(found)
        self.facts.tell(memory=self.memory.report())
        self.facts.ended("device_oom" if on_device else "host_oom", **facts)

    def _allocator_facts(self, found: oom.OutOfMemory) -> dict[str, Any]:
        import torch

        if self.memory_snapshot is not None:
            torch.cuda.memory._dump_snapshot(str(self.memory_snapshot))
        return {
            "bytes_reserved": found.bytes_reserved,
            "fragmented": found.fragmented,
            "allocator_summary": torch.cuda.memory_summary(abbreviated=True),
        }


def _is_importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even the package that it is a part of
        return False


def _show(loss: float | None) -> str:
    return "not a number" if loss is None else f"{loss:.4f}"


def _seconds_since_start() -> float:
    """Since this process began, by the kernel's clock."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def training_arguments(run: Run, output_dir: str) -> Any:
    """transformers' `TrainingArguments` of a run; making them starts the process group."""
    from transformers import TrainingArguments

    arguments = arguments_of(run, output_dir)
    if "deepspeed" in arguments and run.hardware.device == "cpu":
        _leave_out_shared_memory_op()
    return TrainingArguments(**arguments)


def arguments_of(run: Run, output_dir: str) -> dict[str, Any]:
    """What the `TrainingArguments` of a run are made of; DeepSpeed's configuration is under `deepspeed`."""
    on_cpu = run.hardware.device == "cpu"
    arguments: dict[str, Any] = {
        "output_dir": output_dir,
        "per_device_train_batch_size": run.per_device_train_batch_size,
        "gradient_accumulation_steps": run.gradient_accumulation_steps,
        "max_steps": run.num_steps + run.max_skipped_steps,
        "learning_rate": run.training.learning_rate,
        "lr_scheduler_type": run.training.lr_scheduler_type,
        "warmup_steps": run.training.warmup_steps,
        "weight_decay": run.training.weight_decay,
        "max_grad_norm": run.training.max_grad_norm,
        "seed": run.seed,
        "use_cpu": on_cpu,
        # One process alone has no process group, unless DeepSpeed asks for one.
        "ddp_backend": ("gloo" if on_cpu else "nccl") if "RANK" in os.environ else None,
        "ddp_timeout": GLOO_TIMEOUT_SECONDS,
        "dataloader_pin_memory": not on_cpu,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would write 0 for a loss that is not a number
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    deepspeed: dict[str, Any] = {}
    recipe = run.parsed_techniques
    for technique in recipe.values():
        arguments |= technique.training_arguments(recipe)
        merge(deepspeed, technique.deepspeed(run.hardware.device))
    if is_deepspeed(recipe):
        merge(deepspeed, DEEPSPEED_BASE)
        arguments["deepspeed"] = deepspeed
    return arguments


DEEPSPEED_BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
}
"""What every DeepSpeed run has; `auto` is filled in from `TrainingArguments`."""


def _leave_out_shared_memory_op() -> None:
    """DeepSpeed would compile a shared-memory collective with g++ on the first start; gloo needs no compiler."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _when_training_begins(act: Callable[[], None]) -> Any:
    """A callback of Trainer; those that were added before it have their turn first."""
    from transformers import TrainerCallback

    class Begin(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            act()

    return Begin()


def _was_skipped(trainer: Any) -> bool:
    """Whether loss scaling threw the last optimizer step away."""
    if trainer.deepspeed is not None:
        return not trainer.deepspeed.was_step_applied()
    return bool(trainer.accelerator.optimizer_step_was_skipped)


def _working_optimizers(trainer: Any) -> list[Any]:
    """The optimizers that really step: several where each weight, or each kind of weight, has one of its own."""
    optimizer = bare(trainer.optimizer)
    parts: list[Any] = getattr(optimizer, "parts", [optimizer])
    return parts


def _optimizer_facts(trainer: Any) -> dict[str, Any]:
    """What really stepped, and what it keeps on this rank."""
    optimizers = _working_optimizers(trainer)
    names = {
        f"{type(o).__module__}.{type(o).__qualname__}"
        + ("(fused)" if o.defaults.get("fused") else "")
        + ("(paged)" if getattr(o, "is_paged", False) else "")
        for o in optimizers
    }
    states = [
        tensor
        for optimizer in optimizers
        for state in getattr(optimizer, "state", {}).values()
        for value in state.values()
        for tensor in _plain_tensors(value)
        if tensor.numel() > 1
    ]
    return {
        "optimizer_class": " + ".join(sorted(names)),
        "optimizer_state_dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in states}),
        "optimizer_state_bytes": sum(tensor.numel() * tensor.element_size() for tensor in states),
    }


def _plain_tensors(value: Any) -> list[Any]:
    """The tensors that hold a value's bytes: a quantised tensor says it is float32, and consists of others."""
    if not hasattr(value, "numel"):
        return []
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [tensor for name in names for tensor in _plain_tensors(getattr(value, name))]
    return [value]


class _Evaluation:
    """Held-out loss before and after training, through the model as the trainer wrapped it.

    Every rank evaluates the same sequences: ZeRO-3 needs all of them in each forward pass, and nothing has to be
    gathered. Trainer.evaluate can't be used: before training it refuses ZeRO-1 and ZeRO-2.
    """

    def __init__(self, rank: Rank, trainer: Any, eval_data: Any, tokenizer: Path) -> None:
        self.rank, self.trainer, self.eval_data, self.tokenizer = rank, trainer, eval_data, tokenizer
        self.losses: dict[str, float | None] = {}

    def callback(self) -> Any:
        from transformers import TrainerCallback

        evaluation = self

        class Evaluate(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                evaluation.follow_optimizer()
                evaluation.measure("before")
                evaluation.rank.step = 1

            def on_train_end(self, *_: Any, **__: Any) -> None:
                evaluation.measure("after")
                evaluation.summarise()

        return Evaluate()

    def follow_optimizer(self) -> None:
        """By now the trainer has made the optimizer, or DeepSpeed's engine in its place."""
        phases, trainer = self.rank.phases, self.trainer
        if trainer.deepspeed is not None:
            trainer.deepspeed.step = phases.follow_optimizer(trainer.deepspeed.step)
        else:
            optimizer = bare(trainer.optimizer)
            optimizer.register_step_pre_hook(lambda *_: phases.enter("optimizer"))
            optimizer.register_step_post_hook(lambda *_: phases.enter("forward"))

    def measure(self, when: str) -> None:
        from finetune_study.measure.steps import finite

        if self.eval_data is None or not self.rank.run.protocol.evaluates:
            return
        with self.rank.phases.during("evaluate"):
            self.losses[when] = finite(self._loss())
        self.rank.facts.tell(evaluations=self.losses)
        self.rank.say(f"held-out loss {when} training: {_show(self.losses[when])}")

    def summarise(self) -> None:
        """Summaries of held-out dialogues and their ROUGE; every rank writes the same ones."""
        from finetune_study.measure import summaries

        count = self.rank.run.protocol.rouge_samples
        if count == 0:
            return
        with self.rank.phases.during("evaluate"):
            rows = [self.eval_data[number] for number in range(min(count, len(self.eval_data)))]
            written = summaries.write(self.trainer.model, self.tokenizer, rows, self.rank.world_size)
        scores = summaries.rouge(written)
        self.rank.facts.tell(rouge=scores, summaries=[one._asdict() for one in written])
        self.rank.say("ROUGE: " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))

    def _loss(self) -> float:
        import torch

        from finetune_study.measure.steps import collate, flattens

        is_flat = flattens(self.trainer.model)
        model, size = self.trainer.model_wrapped, self.rank.run.micro_batch
        model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(self.eval_data), size):
                rows = [self.eval_data[i] for i in range(start, min(start + size, len(self.eval_data)))]
                batch = {k: v.to(self.trainer.args.device) for k, v in collate(rows, flattens=is_flat).items()}
                predicted = int((batch["labels"] != IGNORED).sum())
                total += float(model(**batch).loss) * predicted
                count += predicted
        model.train()
        return total / count


def main(run_yaml: Path, results: Results, facts_path: Path, memory_snapshot: Path | None) -> None:
    """Runs one rank to its end and leaves the process at once, whatever state its threads and peers are in."""
    facts = Facts(facts_path)
    status = EXIT_ERROR
    rank: Rank | None = None
    try:
        rank = Rank(run_module.load(run_yaml), facts, memory_snapshot)
        rank.train(results)
        facts.ended("completed")
        status = 0
    except BaseException as error:
        found = oom.recognise(error)
        if rank is not None and found is not None:
            rank.tell_out_of_memory(found)
            status = EXIT_OUT_OF_MEMORY
        else:
            if rank is not None:
                rank.memory.lift_budget()
            facts.ended("error", cause=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # No clean-up: threads of a broken process group would wait for peers, and destructors for memory.
    os._exit(status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One rank of a run; finetune_study.launch starts it.")
    parser.add_argument("--run-yaml", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--memory-snapshot", type=Path)
    given = parser.parse_args()
    main(given.run_yaml, Results(given.results), given.facts, given.memory_snapshot)
