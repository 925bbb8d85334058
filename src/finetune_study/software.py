"""How a hardware entry's own Python is called: in a virtual environment, with modules, in an image, in conda."""

import re
import shlex
import shutil
import sys
from pathlib import Path

from finetune_study import run as run_module
from finetune_study.config import Software
from finetune_study.measure.environment import LOCK_COPY

LOAD_MODULES = Path(__file__).with_name("load_modules.sh")


def interpreter(software: Software, default: str, cache: str) -> str:
    """The part of a shell command that calls Python; arguments follow it.

    Args:
        software: of a hardware entry.
        default: the interpreter where the entry names nothing.
        cache: folder of the entry's caches, as the config names it.
    """
    words = _python(software, default, cache)
    if not software.modules:
        return words
    return f". {_quoted(str(LOAD_MODULES), *software.modules)} && {words}"


def _python(software: Software, default: str, cache: str) -> str:
    if software.apptainer is not None:
        inside = _quoted(*software.apptainer_args, _home(software.apptainer), software.python or "python")
        # --nv: GPUs and the driver's libraries. Apptainer binds the working directory only where it can see it.
        command = f'apptainer exec --nv --bind "$PWD" --pwd "$PWD" {inside}'
        if "://" not in software.apptainer:
            return command
        # An image that is fetched is kept, and Apptainer's own place for that is the home folder.
        return f'APPTAINER_CACHEDIR="${{APPTAINER_CACHEDIR:-{_in_double_quotes(cache)}/apptainer}}" {command}'
    if software.conda is not None:
        by = "-p" if "/" in software.conda else "-n"
        # Where conda is a function of the login shell, this variable still says where its command is.
        return f'"${{CONDA_EXE:-conda}}" run --no-capture-output {_quoted(by, _home(software.conda), "python")}'
    if software.python is not None:
        return _quoted(_home(software.python))
    return "python" if software.modules else _quoted(default)


def _home(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


def absolute(software: Software) -> Software:
    """The same from any folder: what is named by a relative path is named by a whole one."""

    def whole(path: str | None, *, is_path: bool) -> str | None:
        return str(Path(_home(path)).absolute()) if path is not None and is_path else path

    return software.model_copy(
        update={
            # In an image it is a path of the image's.
            "python": whole(software.python, is_path=software.apptainer is None and "/" in (software.python or "")),
            "apptainer": whole(software.apptainer, is_path="://" not in (software.apptainer or "")),
            "conda": whole(software.conda, is_path="/" in (software.conda or "")),
        }
    )


def _in_double_quotes(path: str) -> str:
    """A folder of the config in which the node's shell writes out `~/` and variables."""
    path = "$HOME" + path[1:] if path.startswith("~/") else path if path.startswith(("/", "$")) else f"$PWD/{path}"
    return re.sub(r'(["`\\])', r"\\\1", path)


def _quoted(*words: str) -> str:
    return shlex.join(words)


def digest(software: Software) -> str:
    """Changes with the settings, and with the packages of the environment where they can be seen from here."""
    return run_module.digest([software.model_dump(mode="json"), _lock(software)], 12)


def _lock(software: Software) -> str | None:
    """In an image nothing can be seen, nor where a module's Python or a conda environment of some name lies."""
    if software.apptainer is not None or (software.modules and software.python is software.conda is None):
        return None
    if software.conda is not None:
        prefix = Path(_home(software.conda))
    elif software.python is not None:
        prefix = Path(_home(software.python)).parent.parent
    else:
        prefix = Path(sys.prefix)
    try:
        return (prefix / LOCK_COPY).read_text(encoding="utf-8")
    except OSError:
        # No environment of `make`: packages and versions, as their folders' names tell them.
        packages = sorted(path.name for path in prefix.glob("lib/python*/site-packages/*.dist-info"))
        return "\n".join(packages) or None


def missing(software: Software) -> dict[str, str]:
    """What is named by its path and is not there, by its key; seen before anything is submitted."""
    gone: dict[str, str] = {}
    python, image = software.python, software.apptainer
    # A bare name may come with a module; what is in an image can't be seen from here.
    python_is_seen = python is not None and image is None and ("/" in python or not software.modules)
    if python is not None and python_is_seen and shutil.which(_home(python)) is None:
        gone["python"] = _home(python)
    if image is not None and "://" not in image and not Path(_home(image)).exists():
        gone["apptainer"] = _home(image)
    return gone
