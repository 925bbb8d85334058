"""What a rank of the doctor's job says of packages, by importing them."""

import os
import subprocess
import sys
from pathlib import Path

from finetune_study import facts, variables
from finetune_study.doctor.rank import PACKAGES
from finetune_study.ranks import free_port


def test_packages_of_techniques_are_imported(tmp_path: Path) -> None:
    broken = tmp_path / "broken_kernels"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c105')\n", encoding="utf-8")
    told = tmp_path / "rank-0.jsonl"
    asked = ["bitsandbytes", "galore_torch", "broken_kernels", "no_such.package"]
    place = variables.for_rank(0, 1, 1, ("127.0.0.1", free_port()))
    command = [sys.executable, "-m", "finetune_study.doctor.rank", str(told), "cpu", *asked]
    subprocess.run(command, env={**os.environ, **place, "PYTHONPATH": str(tmp_path)}, check=True)
    said = facts.read(told)
    assert {name for name in (*PACKAGES, *asked) if name in said} == {*PACKAGES, "bitsandbytes", "galore_torch"}
    assert said["bitsandbytes"]["version"]
    assert said["galore_torch"]["version"] is None, "it names none"
    assert said["broken_kernels_error"] == "ImportError: undefined symbol: _ZN3c105"
    assert said["no_such.package_error"] == "ModuleNotFoundError: No module named 'no_such'"
