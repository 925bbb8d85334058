"""Wheels of all that `make gpu-check` needs beside Python and PyTorch, for a machine that can fetch nothing.

    python benchmarks/wheels.py FOLDER [--python 3.12] [--platform x86_64]

Versions are those of the environment that runs this. What PyTorch brings along (NVIDIA's libraries, Triton) is left
out, and so is what draws figures. A package without a wheel of its own is built here; that must be pure Python.
"""

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = ("finetune-study[training]", "pytest")
LEFT_OUT = {"torch", "triton", "finetune-study", "vl-convert-python"}
"""The machine's own, the project itself, and the report's figures."""
GLIBC = range(17, 40)
"""Minor versions of glibc 2 for which wheels may be made; pip matches each exactly."""


def needed(python: str, machine: str) -> dict[str, str]:
    """Packages that the roots need, and what these need, with their versions."""
    target = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
        "platform_system": "Linux", "platform_machine": machine, "os_name": "posix",
    }  # fmt: skip
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(root) for root in ROOTS]
    while waiting:
        asked = waiting.pop()
        name = canonicalize_name(asked.name)
        if name in LEFT_OUT and name != "finetune-study":
            continue
        for extra in ("", *asked.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            package = importlib.metadata.distribution(name)
            found[name] = package.version
            inner = (Requirement(line) for line in package.requires or ())
            waiting += [one for one in inner if one.marker is None or one.marker.evaluate(target | {"extra": extra})]
    return {name: version for name, version in sorted(found.items()) if name not in LEFT_OUT}


def fetch(name: str, version: str, folder: Path, python: str, machine: str) -> None:
    """Puts the wheel of a package into a folder.

    Raises:
        SystemExit: where there is none for that Python and machine.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC] + [f"manylinux2014_{machine}"]
    of_machine = [word for platform in platforms for word in ("--platform", platform)]
    for_target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *of_machine]
    download = [*pip, "download", "--no-deps", *for_target, "--dest", str(folder), f"{name}=={version}"]
    if subprocess.run(download, capture_output=True, check=False).returncode == 0:
        return
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), f"{name}=={version}"]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    made = [*folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")]
    if built.returncode or not all(path.name.endswith("-none-any.whl") for path in made):
        raise SystemExit(
            f"wheels.py: there is no wheel of {name} {version} for Python {python} on {machine}, and none of pure "
            f"Python could be built\n{built.stderr.strip()}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", default=here, help="version of Python on that machine, for example 3.12")
    parser.add_argument("--platform", default="x86_64", help="its processor, as `uname -m` says it")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, version in needed(given.python, given.platform).items():
        fetch(name, version, given.folder, given.python, given.platform)
    wheels = sorted(given.folder.glob("*.whl"), key=lambda path: -path.stat().st_size)
    for path in wheels:
        print(f"{path.stat().st_size / 2**20:7.1f} MiB  {path.name}")
    print(f"{sum(path.stat().st_size for path in wheels) / 2**20:7.1f} MiB  in {given.folder}")


if __name__ == "__main__":
    main()
