"""Debian packages that a test runs on."""

import os
import shutil
import subprocess

import pytest


def need(program: str, package: str) -> None:
    """Installs a package, where a program of it is missing.

    Args:
        program: a command, or the path of any of its files.
        package: Debian's name.

    Raises:
        pytest.skip.Exception: where it can't be installed, with the reason.
    """
    if shutil.which(program) or os.path.exists(program):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(f"{program} is missing, and only root on Debian can install {package}")
    install = ["apt-get", "-q", "-y", "install", "--no-install-recommends", package]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(install, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        subprocess.run(["apt-get", "-q", "update"], env=environment, capture_output=True)
        done = subprocess.run(install, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"{package} can't be installed: {done.stderr[-300:]}")
