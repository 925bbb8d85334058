"""What a rank of the doctor's job says of packages, by importing them."""

from pathlib import Path

from finetune_study import facts
from finetune_study.config import Hardware
from finetune_study.doctor import node
from finetune_study.doctor.entries import Entry, pretended
from finetune_study.doctor.rank import PACKAGES


def test_packages_of_techniques_are_imported(tmp_path: Path) -> None:
    broken = tmp_path / "broken_kernels"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c105')\n", encoding="utf-8")
    asked = ["bitsandbytes", "galore_torch", "broken_kernels", "no_such.package"]
    run = pretended(Entry("cpu", Hardware(device="cpu", memory_gib=4)), 1)
    request = node.Request(runs={"cpu": run}, asked={}, uses_offload=False, packages=asked)
    assert node._ranks(run, tmp_path, {"PYTHONPATH": str(tmp_path)}, request) == ["ended"]
    said = facts.read(node.facts_of_rank(tmp_path, 0))
    assert {name for name in (*PACKAGES, *asked) if name in said} == {*PACKAGES, "bitsandbytes", "galore_torch"}
    assert said["bitsandbytes"]["version"]
    assert said["galore_torch"]["version"] is None, "it names none"
    assert said["broken_kernels_error"] == "ImportError: undefined symbol: _ZN3c105"
    assert said["no_such.package_error"] == "ModuleNotFoundError: No module named 'no_such'"
