"""Software of the place, built and run for real: a virtual environment, and modules that bring one."""

import copy
import site
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_study import record
from finetune_study.record import Record
from tests import debian
from tests.slurm.test_study import stand_in, submit
from tests.tiny_study import TINY_STUDY
from tests.workflow.workplace import Workplace

pytestmark = pytest.mark.long

NOTE = """
import os, sys

with open({notes!r}, "a") as stream:
    print(sys.executable, os.environ.get("SITE_STACK"), os.environ.get("LOADEDMODULES"), file=stream)
"""
"""Every interpreter of the environment notes who it is and what its modules have set."""

MODULEFILE = """#%Module
prepend-path PATH {bin}
setenv SITE_STACK "stack of this site"
"""


def make_venv(folder: Path, notes: Path) -> Path:
    """A virtual environment with this project and all it needs, which lie where this Python has them.

    Returns:
        Its interpreter.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    lines = (f"import site; site.addsitedir({path!r})" for path in site.getsitepackages())
    (packages / "shared.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (packages / "sitecustomize.py").write_text(NOTE.format(notes=str(notes)), encoding="utf-8")
    return folder / "bin" / "python"


def of_record(place: Workplace, word: str) -> Record:
    written = record.read_record(place.record(word))
    assert written.ending.status == "completed"
    return written


def test_venv_and_modules_are_what_trains(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    debian.need("/usr/share/modules/init/bash", "environment-modules")
    notes = {name: workplace.folder / f"{name}.notes" for name in ("venv", "modules")}
    pythons = {name: make_venv(workplace.folder / f"env of {name}", notes[name]) for name in notes}
    modulefile = workplace.folder / "modulefiles" / "finetune" / "1.0"
    modulefile.parent.mkdir(parents=True)
    modulefile.write_text(MODULEFILE.format(bin=f"{{{pythons['modules'].parent}}}"), encoding="utf-8")
    # Where a site keeps its modulefiles is known on its nodes; here the job inherits it.
    monkeypatch.setenv("MODULEPATH", str(modulefile.parents[1]))
    raw = copy.deepcopy(TINY_STUDY)
    raw["hardware"] = {
        "venv": stand_in("a100") | {"software": {"python": str(pythons["venv"])}},
        "modules": stand_in("v100") | {"software": {"modules": ["finetune/1.0"]}},
    }
    raw["grid"][0] |= {"hardware": ["venv", "modules"], "recipes": "lora"}
    workplace.write(raw)
    answer = submit(workplace)
    assert answer.returncode == 0, answer.stdout
    for name, python in pythons.items():
        written = of_record(workplace, f"_{name}x1_")
        assert written.slurm_job_id
        assert written.environment["command"][0] == str(python)
        # The supervisor and its rank; nobody else.
        site_says = "None None" if name == "venv" else "stack of this site finetune/1.0"
        supervisor, rank = notes[name].read_text(encoding="utf-8").splitlines()
        assert supervisor == f"{python} {site_says}"
        # What a module sets reaches the run only as far as a run may know it.
        assert rank == f"{python} {site_says.replace('stack of this site', 'None')}"
