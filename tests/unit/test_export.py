"""What `finetune-study export` writes; that it trains is shown in tests/training."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_study import export as exporter
from finetune_study.config import Config
from finetune_study.errors import StudyError
from finetune_study.recommend import Recommendation
from finetune_study.study import Study
from finetune_study.techniques.sharding import Zero2
from tests.unit import handmade

GPU = {
    "gpu": "NVIDIA A100-SXM4-80GB",
    "memory_gib": 80,
    "compute_capability": 8.0,
    "max_gpus": 4,
    "slurm": {"partition": "gpu", "gpu_model": "a100", "cpus_per_gpu": 8, "mem_gib_per_gpu": 100,
              "extra": "--reservation=lab", "max_job_minutes": 600},
}  # fmt: skip
BLOCK: dict[str, Any] = {"targets": "tiny", "hardware": "a100", "recipes": ["full", "lora"], "sequence_length": 128}


def config(**hardware: Any) -> Config:
    grid = [BLOCK | {"num_gpus": [1, 4]}, BLOCK | {"num_gpus": 8, "nodes": [2, 4]}]
    return handmade.study(hardware={"a100": GPU | hardware}, grid=grid, training={"effective_batch_size": 8})


def opened(root: Path, **hardware: Any) -> tuple[Study, Any]:
    asked = config(**hardware)
    planned = {one.run.run_id: one for one in handmade.planned(asked)}
    results = handmade.write(root, *(handmade.completed(one.run, 1.0) for one in planned.values()))
    return Study(asked, results, planned), handmade.frame(asked, root)


def chosen(root: Path, num_gpus: int | None = None, nodes: int | None = None) -> Recommendation:
    return exporter.choose(*opened(root), "tiny", "a100", num_gpus, None, nodes)


def test_the_setting_is_the_defaults_unless_another_is_named(tmp_path: Path) -> None:
    assert (chosen(tmp_path).num_gpus, chosen(tmp_path).nodes) == (8, 2)
    assert (chosen(tmp_path, 4).num_gpus, chosen(tmp_path, 4).nodes) == (4, 1)
    assert chosen(tmp_path, 8, 4).nodes == 4
    with pytest.raises(StudyError, match="8 GPUs on 2 nodes at context 128") as error:
        chosen(tmp_path, 8, 8)
    assert "8 GPUs on 8 nodes at context 128" in str(error.value)
    for nothing in ({"num_gpus": 0}, {"nodes": 0}, {"sequence_length": 0}):
        asked: dict[str, Any] = {"num_gpus": None, "sequence_length": None} | nothing
        with pytest.raises(StudyError, match="no such setting"):
            exporter.choose(*opened(tmp_path), "tiny", "a100", **asked)


def job(root: Path, num_gpus: int, **hardware: Any) -> str:
    study, frame = opened(root, **hardware)
    one = exporter.choose(study, frame, "tiny", "a100", num_gpus, None)
    exporter.export(study, one, root / "export")
    path = root / "export" / "job.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    return path.read_text(encoding="utf-8")


def test_the_job_asks_for_what_the_runs_asked_for(tmp_path: Path) -> None:
    text = job(tmp_path, 4)
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {
        "--nodes=1", "--ntasks-per-node=1", "--gres=gpu:a100:4", "--cpus-per-task=32", "--partition=gpu",
        "--mem=409600", "--reservation=lab",
    } <= {*asked}  # fmt: skip
    assert "run_python -m torch.distributed.run --standalone --nproc-per-node 4 train.py" in text
    assert f'run_python() {{ {sys.executable} "$@"; }}' in text
    assert "srun" not in text


def test_on_several_nodes_each_has_a_launcher(tmp_path: Path) -> None:
    text = job(tmp_path, 8, software={"modules": ["cuda/12"]})
    assert "#SBATCH --nodes=2" in text
    assert "#SBATCH --gres=gpu:a100:4" in text
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=32" in text
    assert "--nnodes 2 --nproc-per-node 4" in text
    assert 'load_modules.sh cuda/12 && python "$@"; }' in text
    about = json.loads((tmp_path / "export" / "recipe.json").read_text(encoding="utf-8"))
    assert (about["num_gpus"], about["nodes"]) == (8, 2)
    readme = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "a100 × 8 on 2 nodes, context 128" in readme
    assert "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d" in readme


@pytest.mark.parametrize("notice", [None, "Synthetic: no run took place."])
def test_what_the_study_says_of_its_numbers_goes_with_them(tmp_path: Path, notice: str | None) -> None:
    study, frame = opened(tmp_path)
    asked = handmade.study(hardware={"a100": GPU}, grid=[BLOCK], report={"notice": notice})
    noticed = Study(study.config.model_copy(update={"report": asked.report}), study.results, study.planned)
    exporter.export(noticed, exporter.choose(noticed, frame, "tiny", "a100", None, None), tmp_path / "export")
    title, _, below, *_ = (tmp_path / "export" / "README.md").read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ")
    assert (below == f"**{notice}**") is (notice is not None)
    assert json.loads((tmp_path / "export" / "recipe.json").read_text(encoding="utf-8"))["notice"] == notice


def test_each_turn_of_a_job_compiles_deepspeeds_operations_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """The lock of a compilation that was killed would hold up the next turn for ever."""
    block = BLOCK | {"recipes": ["zero2"], "num_gpus": 4}
    asked = handmade.study(hardware={"a100": GPU}, recipes={"zero2": {"zero2": {}}}, grid=[block])
    planned = {one.run.run_id: one for one in handmade.planned(asked)}
    results = handmade.write(tmp_path, *(handmade.completed(one.run, 1.0) for one in planned.values()))
    study = Study(asked, results, planned)
    one = exporter.choose(study, handmade.frame(asked, tmp_path), "tiny", "a100", 4, None)
    exporter.export(study, one, tmp_path / "export")
    (named,) = [
        line
        for line in (tmp_path / "export" / "job.sbatch").read_text(encoding="utf-8").splitlines()
        if line.startswith("export TORCH_EXTENSIONS_DIR=")
    ]
    for turn in ("0", "1"):
        variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": turn, "TMPDIR": "/scratch"}
        said = ["bash", "-c", f'{named}; echo "$TORCH_EXTENSIONS_DIR"']
        found = subprocess.run(said, env=variables, capture_output=True, text=True, check=True).stdout
        assert found == f"/scratch/torch_extensions-7-{turn}\n"
    assert "TORCH_EXTENSIONS_DIR" not in job(tmp_path / "without", 4)


def test_the_job_finds_its_python_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f'run_python() {{ {tmp_path}/.venv-gpu/bin/python "$@"; }}' in job(
        tmp_path, 4, software={"python": ".venv-gpu/bin/python"}
    )
    in_image = job(tmp_path, 4, software={"apptainer": "images/a.sif", "python": "/opt/bin/python"})
    assert f'{tmp_path}/images/a.sif /opt/bin/python "$@"; }}' in in_image


def test_arguments_reach_the_launcher_of_each_node_as_they_are(tmp_path: Path) -> None:
    """With commands that stand for SLURM's and for Python: what is called, and with what."""
    tools = tmp_path / "bin"
    tools.mkdir()
    job(tmp_path, 8, software={"python": str(tools / "python")})
    for name, script in {
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": "echo node-1; echo node-2",
        "python": 'case "$*" in *--last-checkpoint) ;; *) printf "%s|" "$@" ;; esac',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    said = subprocess.run(
        ["bash", "job.sbatch", "my data.jsonl", "--output", "here and there"],
        cwd=tmp_path / "export",
        env={"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "71234", "SLURM_JOB_NODELIST": "node-[1-2]"},
        capture_output=True, text=True, check=True,
    ).stdout.split("|")  # fmt: skip
    assert said[-6:-1] == ["train.py", "--data", "my data.jsonl", "--output", "here and there"]
    assert said[said.index("--rdzv-endpoint") + 1] == "node-1:21234"


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ([], "output"),
        (["--output", "here and there"], "here and there"),
        (["--merge", "--output=here and there"], "here and there"),
        (["--output=first", "--out", "second"], "second"),
    ],
)
def test_a_job_that_comes_no_further_does_not_begin_again_for_ever(
    tmp_path: Path, arguments: list[str], output: str
) -> None:
    """With commands that stand for SLURM's, and for the training, which is told that time is nearly over."""
    tools = tmp_path / "bin"
    tools.mkdir()
    job(tmp_path, 4, software={"python": str(tools / "python")})
    for name, script in {
        "scontrol": "echo requeued $2",
        "python": (
            f'case "$*" in *--last-checkpoint) exec {sys.executable} "$@" ;; esac\n'
            f'if [ -n "$FURTHER" ]; then mkdir -p "{output}/checkpoint-$FURTHER"\n'
            f'echo 1 > "{output}/checkpoint-$FURTHER/seconds.json"; fi\n'
            "read -r _ _ _ job _ < /proc/$PPID/stat\n"  # SLURM signals the batch script, of which this is a grandchild
            "kill -USR1 $job; sleep 0.2"
        ),
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)

    def turn(further: str) -> "subprocess.CompletedProcess[str]":
        environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "FURTHER": further}
        return subprocess.run(
            ["bash", "job.sbatch", "my.jsonl", *arguments],
            cwd=tmp_path / "export",
            env=environment,
            capture_output=True,
            text=True,
        )

    assert "no checkpoint was finished in this turn: raise --time" in turn("").stderr
    for step in ("9", "10"):
        assert "requeued 7" in turn(step).stdout
    stuck = turn("10")
    assert (stuck.returncode, "requeued" in stuck.stdout) == (1, False)


def test_files_that_no_export_has_written_are_left_alone(tmp_path: Path) -> None:
    study, frame = opened(tmp_path)
    one = exporter.choose(study, frame, "tiny", "a100", 4, None)
    folder = tmp_path / "export"
    exporter.export(study, one, folder)
    exporter.export(study, one, folder)
    for name in ("deepspeed.json", "train.py"):
        own = tmp_path / f"own-{name}"
        own.mkdir()
        (own / name).write_text("mine")
        with pytest.raises(StudyError, match=f"would overwrite(?s:.*){name}(?s:.*)name another folder"):
            exporter.export(study, one, own)
        assert [path.read_text() for path in own.iterdir()] == ["mine"]
    with pytest.raises(StudyError, match="a file"):
        exporter.export(study, one, own / "train.py")


def test_checkpoints_come_often_enough_for_a_turn() -> None:
    seconds = (None, 0.1, 5.99, 40.0, 5000.0)
    assert [exporter._save_steps(one) for one in seconds] == [100, 100, 100, 15, 1]


def test_settings_are_those_of_the_libraries(tmp_path: Path) -> None:
    study, frame = opened(tmp_path)
    with pytest.raises(StudyError, match="full, lora"):
        exporter.choose(study, frame, "tiny", "a100", 4, None, recipe="zero2")
    lora = exporter.choose(study, frame, "tiny", "a100", 4, None, recipe="lora")
    exporter.export(study, lora, tmp_path / "export")
    about = json.loads((tmp_path / "export" / "recipe.json").read_text())
    assert (about["recipe"], about["verdict"]) == ("lora", "chosen_by_hand")
    readme = (tmp_path / "export" / "README.md").read_text()
    assert "lora was chosen by hand. full is recommended there: full " in readme
    assert "Verdict: chosen by hand." in readme
    method = json.loads((tmp_path / "export" / "peft.json").read_text())
    assert (method["peft_type"], method["task_type"], method["r"]) == ("LORA", "CAUSAL_LM", 8)
    arguments = json.loads((tmp_path / "export" / "training_arguments.json").read_text())
    assert (arguments["num_train_epochs"], arguments["learning_rate"]) == (1, 4e-4)
    assert "max_steps" not in arguments


def test_what_is_code_and_no_setting_is_not_exported_as_if_it_were_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Zero2, "is_exported", lambda self: False)
    asked = handmade.study(
        hardware={"a100": GPU}, recipes={"zero2": ["zero2"]}, grid=[BLOCK | {"recipes": ["zero2"], "num_gpus": 4}],
        training={"effective_batch_size": 8},
    )  # fmt: skip
    planned = {one.run.run_id: one for one in handmade.planned(asked)}
    results = handmade.write(tmp_path, *(handmade.completed(one.run, 1.0) for one in planned.values()))
    one = exporter.choose(Study(asked, results, planned), handmade.frame(asked, tmp_path), "tiny", "a100", None, None)
    with pytest.raises(StudyError, match="can't do what was measured") as error:
        exporter.export(Study(asked, results, planned), one, tmp_path / "export")
    assert "zero2: applied by finetune-study itself" in str(error.value)


def test_the_script_says_how_it_is_called(tmp_path: Path) -> None:
    job(tmp_path, 4)
    train = (tmp_path / "export" / "train.py").read_text(encoding="utf-8")
    assert "    torchrun --standalone --nproc-per-node 4 train.py --data my.jsonl" in train
    compile(train, "train.py", "exec")


@pytest.mark.parametrize(
    ("prompt", "completion", "ids", "trained"),
    [
        ("abc", "de", [97, 98, 99, 100, 101, 0, 0, 0], [3, 4, 5]),
        ("abcdefgh", "xy", [100, 101, 102, 103, 104, 120, 121, 0], [5, 6, 7]),
        ("ab", "0123456789", [48, 49, 50, 51, 52, 53, 54, 55], list(range(8))),
    ],
    ids=["short", "long prompt", "long completion"],
)
def test_a_long_prompt_leaves_room_for_what_is_learnt(
    tmp_path: Path, prompt: str, completion: str, ids: list[int], trained: list[int]
) -> None:
    job(tmp_path, 4)
    script: dict[str, Any] = {"__file__": str(tmp_path / "export" / "train.py"), "__name__": "train"}
    exec((tmp_path / "export" / "train.py").read_text(encoding="utf-8"), script)

    class Bytes:
        eos_token_id = pad_token_id = 0

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

    made = script["example"]({"prompt": prompt, "completion": completion}, Bytes(), 8)
    assert made["input_ids"] == ids
    assert [i for i, label in enumerate(made["labels"]) if label != -100] == trained
