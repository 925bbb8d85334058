import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_study import software
from finetune_study.config import Software
from tests import debian

LOAD = software.LOAD_MODULES

CACHE = "/lab/study/results/cache"

GOLDEN: list[tuple[dict[str, Any], str]] = [
    ({}, "'/opt/the default/python'"),
    ({"python": "/opt/my envs/gpu/bin/python"}, "'/opt/my envs/gpu/bin/python'"),
    ({"modules": ["cuda/12.6", "python/3.11"]}, f". {LOAD} cuda/12.6 python/3.11 && python"),
    ({"modules": "cuda/12.6", "python": "/envs/gpu/bin/python"}, f". {LOAD} cuda/12.6 && /envs/gpu/bin/python"),
]


@pytest.mark.parametrize(("given", "expected"), GOLDEN)
def test_golden_command_lines(given: dict[str, Any], expected: str) -> None:
    assert software.interpreter(Software.model_validate(given), "/opt/the default/python", CACHE) == expected


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "apptainer_file": ({"apptainer": "/images/a b.sif"}, CACHE),
    "apptainer_python_and_arguments": (
        {
            "apptainer": "/images/gpu.sif",
            "apptainer_args": ["--bind", "/scratch $USER"],
            "python": "/opt/env/bin/python",
        },
        CACHE,
    ),
    "apptainer_address": ({"apptainer": "docker://site/image:1"}, CACHE),
    "apptainer_address_cache_of_the_node": ({"apptainer": "docker://site/image:1"}, "~/scratch/$USER"),
    "apptainer_module": ({"modules": "apptainer/1.3", "apptainer": "/images/gpu.sif"}, CACHE),
    "conda_name": ({"conda": "gpu"}, CACHE),
    "conda_path": ({"conda": "/envs/a b"}, CACHE),
    "conda_module": ({"modules": "miniconda", "conda": "gpu"}, CACHE),
}
"""The command lines of what is not built and run by any test, by the file in golden/ that holds each."""


@pytest.mark.parametrize("name", FILES)
def test_golden_files(name: str) -> None:
    given, cache = FILES[name]
    command = software.interpreter(Software.model_validate(given), "python", cache)
    written = f"{command} -m finetune_study.launch results/runs/a/run.yaml\n".replace(str(LOAD), "<load_modules.sh>")
    golden = Path(__file__).parent / "golden" / "software" / f"{name}.sh"
    if os.environ.get("RENEW_GOLDEN"):
        golden.write_text(written, encoding="utf-8")
    assert written == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
def test_golden_command_lines_reach_their_program_whole(name: str, tmp_path: Path) -> None:
    """A shell splits them as they are meant; a program of the same name prints what reaches it."""
    given, cache = FILES[name]
    for program in ("apptainer", "conda"):
        path = tmp_path / program
        path.write_text('#!/bin/sh\nprintf "%s\\n" "$APPTAINER_CACHEDIR" "$@"\n')
        path.chmod(0o755)
    command = software.interpreter(Software.model_validate({**given, "modules": []}), "python", cache)
    answer = strict_shell(f"{command} -m x", PATH=f"{tmp_path}:{os.environ['PATH']}", HOME="/home/user", USER="user")
    assert answer.returncode == 0, answer.stderr
    folder, *words = answer.stdout.splitlines()
    asked = Software.model_validate(given)
    image = asked.apptainer or asked.conda
    assert image in words
    assert words[-2:] == ["-m", "x"]
    assert all(word in words for word in asked.apptainer_args)
    expanded = {CACHE: CACHE, "~/scratch/$USER": "/home/user/scratch/user"}[cache]
    assert folder == (f"{expanded}/apptainer" if asked.apptainer and "://" in asked.apptainer else "")


def test_users_own_cache_of_apptainer_is_kept(tmp_path: Path) -> None:
    (tmp_path / "apptainer").write_text('#!/bin/sh\necho "$APPTAINER_CACHEDIR"\n')
    (tmp_path / "apptainer").chmod(0o755)
    command = software.interpreter(Software(apptainer="docker://a/b"), "python", CACHE)
    answer = strict_shell(command, PATH=f"{tmp_path}:{os.environ['PATH']}", APPTAINER_CACHEDIR="/mine")
    assert answer.stdout == "/mine\n"


@pytest.mark.parametrize("key", ["python", "apptainer", "conda"])
def test_home_folder_is_written_out(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    assert "/home/user/x" in software.interpreter(Software.model_validate({key: "~/x"}), "python", CACHE)


def strict_shell(command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """As Snakemake runs a rule's command."""
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; {command}"],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def modulepath(tmp_path: Path) -> str:
    """Modulefiles of a site, for Debian's environment modules."""
    debian.need("/usr/share/modules/init/bash", "environment-modules")
    for name in ("cuda/12.6", "a b"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#%Module\nappend-path SITE_LOADED {{{name}}}\n")
    (tmp_path / "broken").write_text("#%Module\nno_such_command\n")
    return str(tmp_path)


def test_modules_are_loaded_in_a_batch_shell(modulepath: str) -> None:
    chosen = Software(modules=["cuda/12.6", "a b"], python=sys.executable)
    call = software.interpreter(chosen, "", CACHE)
    command = f"{call} -c 'import os, sys; print(os.environ[\"SITE_LOADED\"]); sys.exit(3)'"
    answer = strict_shell(command, MODULEPATH=modulepath)
    assert (answer.stdout, answer.returncode) == ("cuda/12.6:a b\n", 3), answer.stderr


@pytest.mark.parametrize("name", ["missing", "broken"])
def test_a_module_that_can_not_be_loaded_starts_nothing(modulepath: str, name: str) -> None:
    command = software.interpreter(Software(modules=[name]), "", CACHE) + " -c 'print(1)'"
    answer = strict_shell(command, MODULEPATH=modulepath)
    assert (answer.stdout, answer.returncode) == ("", 1)
    assert name in answer.stderr


def test_without_a_module_command_the_log_says_so() -> None:
    # Where this machine has modules, they are hidden from this shell alone.
    hidden = [path for path in ("/etc/profile.d", "/usr/share/lmod", "/usr/share/modules") if Path(path).exists()]
    if os.geteuid() != 0:
        if any(Path(path, name).exists() for path in hidden for name in ("modules.sh", "lmod.sh", "init/bash")):
            pytest.skip("this machine has environment modules, and only root can hide them from a shell")
        hidden = []
    command = software.interpreter(Software(modules=["cuda/12.6"]), "", CACHE) + " --version"
    mounts = "".join(f"mount -t tmpfs tmpfs {path}; " for path in hidden)
    shell = ["unshare", "--mount", "bash", "-c"] if hidden else ["bash", "-c"]
    answer = subprocess.run(
        [*shell, f"set -euo pipefail; {mounts}{command}"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
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


def test_digest_of_an_environment_without_a_lock_changes_with_its_packages(tmp_path: Path) -> None:
    site = tmp_path / "lib" / "python3.12" / "site-packages"
    (site / "torch-2.12.0.dist-info").mkdir(parents=True)
    asked = Software(python=f"{tmp_path}/bin/python")
    before = software.digest(asked)
    (site / "torch-2.12.0.dist-info").rename(site / "torch-2.13.0.dist-info")
    assert software.digest(asked) != before
