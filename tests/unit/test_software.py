import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_study import software
from finetune_study.config import Software

LOAD = software.LOAD_MODULES

GOLDEN: list[tuple[dict[str, Any], str]] = [
    ({}, "'/opt/the default/python'"),
    ({"python": "/opt/my envs/gpu/bin/python"}, "'/opt/my envs/gpu/bin/python'"),
    ({"modules": ["cuda/12.6", "python/3.11"]}, f". {LOAD} cuda/12.6 python/3.11 && python"),
    ({"modules": "cuda/12.6", "python": "/envs/gpu/bin/python"}, f". {LOAD} cuda/12.6 && /envs/gpu/bin/python"),
    ({"apptainer": "/images/a b.sif"}, """apptainer exec --nv --bind "$PWD" --pwd "$PWD" '/images/a b.sif' python"""),
    (
        {
            "apptainer": "docker://site/image:1",
            "apptainer_args": ["--bind", "/scratch $USER"],
            "python": "/opt/env/bin/python",
        },
        """apptainer exec --nv --bind "$PWD" --pwd "$PWD" --bind '/scratch $USER' docker://site/image:1 """
        "/opt/env/bin/python",
    ),
    (
        {"modules": "apptainer/1.3", "apptainer": "/images/gpu.sif"},
        f""". {LOAD} apptainer/1.3 && apptainer exec --nv --bind "$PWD" --pwd "$PWD" /images/gpu.sif python""",
    ),
    ({"conda": "gpu"}, '"${CONDA_EXE:-conda}" run --no-capture-output -n gpu python'),
    ({"conda": "/envs/a b"}, """"${CONDA_EXE:-conda}" run --no-capture-output -p '/envs/a b' python"""),
]


@pytest.mark.parametrize(("given", "expected"), GOLDEN)
def test_golden_command_lines(given: dict[str, Any], expected: str) -> None:
    assert software.interpreter(Software.model_validate(given), "/opt/the default/python") == expected


@pytest.mark.parametrize("key", ["python", "apptainer", "conda"])
def test_home_folder_is_written_out(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert "/home/ann/x" in software.interpreter(Software.model_validate({key: "~/x"}), "python")


def strict_shell(command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """As Snakemake runs a rule's command."""
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; {command}"],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """The `module` command of a site, whose initialisation would not survive `set -eu`."""
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "bash").write_text(
        "false; : $never_set\n"
        'module() { shift; [ "$1" = missing ] && return 1; export LOADEDMODULES="$(IFS=:; echo "$*")"; }'
    )
    return tmp_path


def test_modules_are_loaded_in_a_batch_shell(modules: Path) -> None:
    chosen = Software(modules=["cuda/12.6", "a b"], python=sys.executable)
    command = (
        f"{software.interpreter(chosen, '')} -c 'import os, sys; print(os.environ[\"LOADEDMODULES\"]); sys.exit(3)'"
    )
    answer = strict_shell(command, MODULESHOME=str(modules))
    assert (answer.stdout, answer.returncode) == ("cuda/12.6:a b\n", 3)


def test_a_module_that_is_missing_starts_nothing(modules: Path) -> None:
    command = software.interpreter(Software(modules=["missing"]), "") + " -c 'print(1)'"
    answer = strict_shell(command, MODULESHOME=str(modules))
    assert (answer.stdout, answer.returncode) == ("", 1)


def test_without_a_module_command_the_log_says_so(tmp_path: Path) -> None:
    if any(Path(path).exists() for path in ("/etc/profile.d/modules.sh", "/etc/profile.d/lmod.sh")):
        pytest.skip("this machine has environment modules")
    answer = strict_shell(software.interpreter(Software(modules=["cuda/12.6"]), "") + " --version")
    assert answer.returncode == 1
    assert "has no `module` command, to load cuda/12.6" in answer.stderr


def test_what_is_missing_is_seen_beforehand(tmp_path: Path) -> None:
    here, gone = str(tmp_path), str(tmp_path / "gone")
    assert software.missing(Software()) == {}
    assert software.missing(Software(python=sys.executable)) == {}
    assert software.missing(Software(python="bash")) == {}
    assert software.missing(Software(python=gone)) == {"python": gone}
    assert software.missing(Software(python="no-such-python")) == {"python": "no-such-python"}
    assert software.missing(Software(python="no-such-python", modules=["x"])) == {}
    assert software.missing(Software(python=gone, apptainer=here)) == {}
    assert software.missing(Software(apptainer=gone)) == {"apptainer": gone}
    assert software.missing(Software(apptainer="docker://a/b")) == {}


def test_digest_changes_with_the_settings_and_with_a_lock_that_can_be_seen(tmp_path: Path) -> None:
    """What lies in an image, or under a name alone, can't."""
    home = str(tmp_path)
    seen = [
        Software(python=f"{home}/bin/python"),
        Software(python=f"{home}/bin/python", modules=["m"]),
        Software(conda=home),
    ]
    unseen = [
        Software(),
        Software(modules=["m"]),
        Software(conda="it"),
        Software(apptainer="a.sif", python="/bin/python"),
    ]
    before = [software.digest(one) for one in (*seen, *unseen)]
    assert len(set(before)) == len(before)
    (tmp_path / "finetune-study.lock").write_text("torch==2.13.0\n")
    after = [software.digest(one) for one in (*seen, *unseen)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False] * 3 + [True] * 4
