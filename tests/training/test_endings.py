"""However a run ends, its folder says so: record.json for an outcome, failure.json for anything else, never both."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_study import data, record
from finetune_study import launch as supervisor
from finetune_study.launch import Launch, Verdict
from finetune_study.paths import MANIFEST, Results, RunPaths
from finetune_study.ranks import End
from finetune_study.run import Run
from tests.training import lab as lab_module
from tests.training.lab import LIMIT_SECONDS, WIDE, Ended, Lab, is_alive, launch, rank_facts, rank_pids, wait_for

pytestmark = [pytest.mark.training, pytest.mark.long]

GIB = 2**30
BIG = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
"""63 million weights: 0.24 GiB of them, as much of gradients, twice as much of Adam's states."""
SHORT = {"sequence_length": 64, "micro_batch": 1}


def slow_run(lab: Lab, **settings: Any) -> Run:
    """A run of 300 steps of a fifth of a second: long enough to be interrupted."""
    one_by_one = {"effective_batch_size": 1}
    many = {"num_timed_steps": 299}
    return lab.run(
        architecture=WIDE,
        micro_batch=1,
        training=one_by_one,
        protocol=many,
        data={"dataset": lab.plenty, "num_eval_samples": 0},
        **settings,
    )


# --- outcomes --------------------------------------------------------------------------------------------------------


def test_completed(lab: Lab) -> None:
    done = lab.train()
    assert done.status == 0
    assert done.record.ending.model_dump(exclude_none=True) == {"status": "completed"}
    assert f"{done.record.run.run_id}: completed after" in done.output
    assert not done.paths.scratch.exists()
    assert done.record.environment["allocation"]["by"] == "none"


@pytest.mark.parametrize(
    ("phase", "recipe", "settings"),
    [
        pytest.param("load", {}, {"architecture": BIG, "budget_gib": 0.2, **SHORT}, id="load"),
        pytest.param(
            "forward",
            {"eager": {}},  # scores of 1024 x 1024 for each layer, head and sequence
            {
                "architecture": {"num_hidden_layers": 8},
                "budget_gib": 0.5,
                "sequence_length": 1024,
                "micro_batch": 4,
            },
            id="forward",
        ),
        pytest.param("backward", {}, {"architecture": BIG, "budget_gib": 0.45, **SHORT}, id="backward"),
        pytest.param("optimizer", {}, {"architecture": BIG, "budget_gib": 0.8, **SHORT}, id="optimizer"),
    ],
)
def test_device_oom(lab: Lab, phase: str, recipe: dict[str, Any], settings: dict[str, Any]) -> None:
    out = lab.train(recipe, **settings)
    ending, budget = out.record.ending, settings["budget_gib"] * GIB
    assert out.status == 0
    assert (ending.status, ending.phase, ending.rank) == ("device_oom", phase, 0)
    assert ending.step == (0 if phase == "load" else 1)
    assert ending.reason is not None
    assert "DefaultCPUAllocator" in ending.reason
    assert ending.bytes_requested is not None
    assert ending.bytes_held is not None
    assert ending.bytes_requested >= 2**20
    assert ending.bytes_held <= budget <= ending.bytes_held + ending.bytes_requested + 2 * 2**20
    assert 0 < out.peak() <= budget
    assert out.first_rank.get("steps", []) == []
    assert out.row["oom_phase"] == phase
    assert out.row["step_time_seconds_median"] is None


def test_a_twin_that_needs_less_completes(lab: Lab) -> None:
    """The budget that the optimizer's states of full fine-tuning break holds for LoRA."""
    lora = lab.train({"lora": {"r": 4}}, architecture=BIG, budget_gib=0.8, **SHORT)
    assert lora.record.ending.status == "completed"


def test_device_oom_of_two_ranks(lab: Lab) -> None:
    """What the peer then says of a broken connection is no bug."""
    out = lab.train({"zero2": {}}, num_gpus=2, architecture=BIG, budget_gib=0.75, **SHORT)
    ending = out.record.ending
    assert out.status == 0
    assert out.seconds < 60
    assert ending.status == "device_oom"
    assert ending.rank in (0, 1)
    assert ending.phase in ("backward", "optimizer")
    assert len(out.record.ranks) == 2


def _conclude(tmp_path: Path, run: Run, *ends: End) -> Verdict:
    """Of a launch whose ranks have ended so."""
    paths = RunPaths(tmp_path)
    tried = Launch(run, paths.run_yaml, Results(tmp_path), paths, None, False)
    tried.ends = {end.number: end for end in ends}
    return tried._conclude()


def _end(number: int, how: str, at: float, *, killed_by_us: bool = False) -> End:
    return End(number, how, at, {"how": how, "cause": f"cause {number}", "phase": "backward"}, {}, killed_by_us)


def test_the_earliest_end_decides(tmp_path: Path, lab: Lab) -> None:
    run = lab.run(num_gpus=2)
    ending = _conclude(tmp_path, run, _end(0, "error", 14.0), _end(1, "device_oom", 10.0)).ending
    assert ending is not None
    assert (ending.status, ending.rank, ending.phase) == ("device_oom", 1, "backward")
    verdict = _conclude(tmp_path, run, _end(0, "error", 10.0), _end(1, "device_oom", 14.0))
    assert (verdict.ending, verdict.cause) == (None, "cause 0")
    killed = _end(0, "error", 9.0, killed_by_us=True)
    ending = _conclude(tmp_path, run, killed, _end(1, "device_oom", 10.0)).ending
    assert ending is not None
    assert ending.rank == 1


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup with room for the supervisor and not for the rank."""
    limit = 600 * 2**20
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root, file = (v1, "memory.limit_in_bytes") if (v1 / "cgroup.procs").exists() else (v2, "memory.max")
    folder = root / f"finetune-study-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here ({error.strerror})")
    try:
        try:
            (folder / file).write_text(str(limit))
            swap = folder / "memory.swap.max"
            if swap.exists():
                swap.write_text("0")
        except OSError as error:
            pytest.skip(f"no memory cgroup can be limited here ({error.strerror})")
        yield folder
    finally:
        wait_for(lambda: not (folder / "cgroup.procs").read_text(), "the cgroup is empty")
        folder.rmdir()


def test_host_oom_by_a_memory_cgroup(lab: Lab, small_cgroup: Path) -> None:
    run = lab.run(architecture=BIG, **SHORT)
    procs = small_cgroup / "cgroup.procs"
    out = launch(lab.prepare(run), preexec_fn=lambda: procs.write_text(str(os.getpid())))
    assert out.status == 0
    ending = out.record.ending
    assert (ending.status, ending.rank) == ("host_oom", 0)
    assert ending.reason is not None
    assert "the kernel killed rank 0" in ending.reason
    assert "0.59 GiB" in ending.reason


def test_timeout_keeps_what_was_measured(lab: Lab) -> None:
    run = slow_run(lab)
    seconds = 30.0  # of which libraries take 8 to be imported, and 20 on a busy machine
    out = launch(lab.prepare(run), "--time-limit-minutes", str(seconds / 60))
    assert out.status == 0
    assert out.record.ending.status == "timeout"
    assert out.record.ending.reason == "time limit of 30 s reached"
    assert seconds <= (out.record.duration_seconds or 0) < seconds + 10
    steps = out.first_rank["steps"]
    assert 1 < len(steps) < run.num_steps
    assert out.row["num_timed_steps"] == len(steps) - 1
    assert out.row["step_time_seconds_median"] > 0
    assert out.peak() > 0


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_bug_is_a_failure_that_says_what_and_where(lab: Lab) -> None:
    out = lab.train({"lora": {"target_modules": ["no_such_layer"]}})
    assert out.status == 1
    failure = out.failure
    assert failure.attempt == 1
    assert failure.cause.startswith("rank 0: ")
    assert "Target modules {'no_such_layer'} not found" in failure.cause
    assert failure.traceback is not None
    assert "techniques/peft_method.py" in failure.traceback
    assert "no_such_layer" in failure.log_tail
    assert failure.log == str(out.paths.log)
    assert f"FAILED: {failure.cause}" in out.output
    assert f"log: {out.paths.log}" in out.output
    assert Path(failure.log).read_text(encoding="utf-8").rstrip().endswith(failure.log_tail[-200:])


def test_every_try_counts_and_a_success_removes_the_failure(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    run = lab.run()
    paths = lab.prepare(run)
    config = lab.results.model(run.model_key) / "config.json"
    whole = config.read_text(encoding="utf-8")
    config.write_text(json.dumps(json.loads(whole) | {"num_attention_heads": 5}), encoding="utf-8")
    for attempt in (1, 2):
        failed = launch(paths)
        assert failed.status == 1
        assert failed.failure.attempt == attempt
    config.write_text(whole, encoding="utf-8")
    done = launch(paths)
    assert done.status == 0
    assert done.record.attempt == 3


def test_unprepared_model_and_data(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    run = lab.run()
    paths = lab.write(run)
    out = launch(paths)
    assert out.status == 1
    assert "The run's model is not prepared" in out.failure.cause
    assert str(lab.results.model(run.model_key)) in out.output
    lab.prepare(run)
    folder = lab.results.data(run.data_key)
    shutil.rmtree(folder / "train")
    assert "The run's data is no longer whole" in launch(paths).failure.cause
    shutil.rmtree(folder)
    last = launch(paths).failure
    assert "The run's data is not prepared" in last.cause
    assert last.attempt == 3


def test_too_few_sequences(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    paths = lab.prepare(lab.run())
    longer = lab.run(protocol={"num_timed_steps": lab_module.STEPS})  # a step more, of the same data
    out = launch(lab.write(longer))
    assert out.status == 1
    assert "too few sequences" in out.failure.cause
    assert "16 sequences" in out.failure.cause
    assert "at least 20" in out.failure.cause
    manifest = lab.results.data(longer.data_key) / MANIFEST
    assert data.load(manifest.parent)[0].num_rows == 16
    assert not paths.failure.exists()


# --- ends from outside, while a rank trains --------------------------------------------------------------------------


class Going:
    """A slow run that has finished its first step."""

    def __init__(self, lab: Lab, **more: Any) -> None:
        self.run = slow_run(lab)
        self.paths = lab.prepare(self.run)
        self.supervisor = lab_module.start(self.paths, **more)
        wait_for(lambda: rank_facts(self.paths).get("steps") or self.supervisor.poll() is not None, "a step is done")
        assert self.supervisor.poll() is None, self.supervisor.stdout.read()
        (self.rank,) = rank_pids(self.supervisor.pid)

    def end(self) -> Ended:
        output, _ = self.supervisor.communicate(timeout=LIMIT_SECONDS)
        return Ended(self.paths, self.supervisor.returncode, output, 0.0)


@pytest.fixture
def going(tmp_path: Path) -> Iterator[Going]:
    started = Going(Lab(tmp_path))
    try:
        yield started
    finally:
        started.supervisor.kill()
        started.supervisor.communicate()


def test_a_rank_that_is_killed_is_a_failure(going: Going) -> None:
    """Nothing ran out of memory: somebody killed it."""
    os.kill(going.rank, signal.SIGKILL)
    out = going.end()
    assert out.status == 1
    assert out.failure.cause == "rank 0 was killed by SIGKILL and left no word"


def test_sigterm_ends_the_ranks_and_a_second_launch_is_refused_until_then(going: Going) -> None:
    refused = launch(going.paths)
    assert refused.status == 1
    assert "Another process is measuring this run" in refused.output
    assert str(going.paths.folder) in refused.output
    assert not going.paths.failure.exists()
    assert is_alive(going.rank)
    going.supervisor.terminate()
    out = going.end()
    assert out.status == 1
    assert out.failure.cause == "ended from outside by SIGTERM"
    assert "step 1 of" in out.failure.log_tail
    assert not is_alive(going.rank)
    # Kept for finetune_study.after_kill: it may have been SLURM, whose time limit begins with this signal.
    about = record.read_about(out.paths)
    assert about is not None
    assert (about.attempt, about.started_at) == (1, out.failure.started_at)
    assert rank_facts(out.paths)["steps"]


def test_the_ranks_die_with_their_supervisor(going: Going) -> None:
    going.supervisor.kill()
    going.supervisor.wait()
    wait_for(lambda: not is_alive(going.rank), "the rank is dead")
    assert not going.paths.record.exists()
    assert not going.paths.failure.exists()
    with supervisor.locked(going.paths.lock):
        pass  # the next try is not refused


# --- variables planted in the shell ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A shell full of traps; a rank that took PYTHONPATH over would import a torch that raises."""
    trap = tmp_path_factory.mktemp("trap")
    (trap / "torch.py").write_text("raise ImportError('planted')\n")
    return {
        "OMP_NUM_THREADS": "7",
        "MKL_NUM_THREADS": "7",
        "HF_TOKEN": "planted",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(trap),
        "PYTHONHASHSEED": "7",
        "LD_BIND_NOT": "1",
        "LD_AUDIT": "",
        "TORCH_LOGS": "+all",
        "TORCH_SHOW_CPP_STACKTRACES": "1",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:7",
        "ACCELERATE_USE_CPU": "0",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "RANK": "7",
        "WORLD_SIZE": "8",
        "MASTER_PORT": "1",
        "DS_ACCELERATOR": "planted",
        "CUDA_VISIBLE_DEVICES": "7",
    }


def test_planted_variables_do_not_reach_a_rank(tmp_path: Path, planted: dict[str, str]) -> None:
    running = Going(Lab(tmp_path), variables=planted)
    try:
        pairs = Path(f"/proc/{running.rank}/environ").read_bytes().decode().split("\0")
        seen = dict(pair.split("=", 1) for pair in pairs if pair)
    finally:
        running.supervisor.terminate()
        running.end()
    assert [name for name, value in planted.items() if value and seen.get(name) == value] == []
    assert "HF_TOKEN" not in seen
    assert "PYTHONPATH" not in seen
    assert int(seen["OMP_NUM_THREADS"]) == len(os.sched_getaffinity(0))
    assert seen["HF_HUB_OFFLINE"] == "1"


def test_a_repetition_under_planted_variables_is_the_same_run(tmp_path: Path, planted: dict[str, str]) -> None:
    """It lies beside the study's record, which stays as it is; with --if-needed nothing is repeated."""
    lab = Lab(tmp_path)
    first = lab.train()
    before = first.paths.record.read_bytes()

    idle = launch(first.paths, "--if-needed")
    assert idle.status == 0
    assert "measured already" in idle.output
    assert not (first.paths.folder / "again-1").exists()

    again = launch(first.paths, variables=planted)
    assert again.status == 0
    assert "repeating it in" in again.output
    assert first.paths.record.read_bytes() == before
    assert not first.paths.failure.exists()
    repeated = record.read_record(first.paths.folder / "again-1" / "record.json")
    assert repeated.run == first.record.run
    # Temporary files of each try have a folder of their own.
    own = {"TMPDIR", "TORCH_EXTENSIONS_DIR"}
    variables, before_that = (one.environment["variables"] for one in (repeated, first.record))
    assert {k: v for k, v in variables.items() if k not in own} == {
        k: v for k, v in before_that.items() if k not in own
    }
    assert repeated.environment["variables"]["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert "HF_TOKEN" not in json.dumps(repeated.environment)
    losses = [[step["loss"] for step in one.ranks[0]["steps"]] for one in (first.record, repeated)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert repeated.ranks[0]["compute_dtype"] == "float32"
