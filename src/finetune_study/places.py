"""Where caches, compiled ops and temporary files lie: in the folders that the config names, never in a home folder."""

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune_study import run as run_module
from finetune_study import variables
from finetune_study.config import Places
from finetune_study.errors import StudyError
from finetune_study.paths import Results
from finetune_study.run import Run

DEFAULT = Places()

VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")

BUILDING = "lock"
"""In the folder of an op while a process compiles it (torch.utils.cpp_extension). One that is killed leaves it behind,
and torch waits for ever until it goes."""


def of(study: Places, hardware: Places) -> Places:
    """The folders of a hardware entry: its own, and the study's for what it leaves open."""
    return Places(**(study.model_dump(exclude_none=True) | hardware.model_dump(exclude_none=True)))


def options(asked: Places) -> str:
    """As options of `launch`, quoted for a shell: variables are the node's to write out."""
    given = asked.model_dump(exclude_none=True)
    return shlex.join(f"--{name}={folder}" for name, folder in given.items())


def written_out(folder: str, key: str) -> Path:
    """A folder as this machine understands it; relative ones start where Snakemake was called.

    Raises:
        StudyError: when a variable in it is not set here.
    """
    names = [plain or braced for plain, braced in VARIABLE.findall(folder)]
    unset = [name for name in names if not os.environ.get(name)]
    if unset:
        raise StudyError(
            f"{' and '.join(f'${name}' for name in unset)} of a folder in the config is not set on {platform.node()}",
            where=f"{key}, of the study or of a hardware entry",
            given=folder,
            do="name the folder itself; a variable that only the nodes have belongs into hardware.<name>.places",
        )
    return Path(os.path.expanduser(os.path.expandvars(folder))).absolute()


def cache_of(asked: Places, results: Results) -> Path:
    """The folder of caches, made.

    Raises:
        StudyError: when it can't be made or written to.
    """
    folder = results.cache.absolute() if asked.cache is None else written_out(asked.cache, "places.cache")
    return _made(folder, "places.cache")


def temporary_of(asked: Places) -> Path | None:
    """The folder of temporary files, made; None is the machine's own.

    Raises:
        StudyError: when it can't be made or written to.
    """
    if asked.temporary is None:
        return None
    return _made(written_out(asked.temporary, "places.temporary"), "places.temporary")


def _made(folder: Path, key: str) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # a read-only file system says so only now
    except OSError as error:
        raise StudyError(
            "A folder for caches or temporary files can't be written to",
            where=f"{key} on {platform.node()}",
            given=f"{folder}: {error.strerror}",
            do=f"name a folder under `{key}` of the config, or of hardware.<name>, that is writable there",
        ) from None
    return folder


def enter(asked: Places, results: Results) -> None:
    """For this process and its children, where models and data are prepared: caches and temporary files lie there.

    It has to come before the libraries are imported, which read their variables then.

    Raises:
        StudyError: when a folder can't be used.
    """
    os.environ.update(variables.for_preparation(cache_of(asked, results), os.environ))
    temporary = temporary_of(asked)
    if temporary is not None:
        os.environ["TMPDIR"] = str(temporary)


@contextmanager
def opened(asked: Places, run: Run, results: Results) -> Iterator[dict[str, str]]:
    """The folders of a run on this node, and the variables that send its ranks there.

    Temporary files go when the block ends, however the ranks ended. Ops are compiled there, too, in a copy of what
    earlier runs compiled: nobody waits for a rank of another run, least of all for one that was killed. Packages that
    `prepare` compiled for runs like this one are imported from where it put them.

    Raises:
        StudyError: when a folder can't be used.
    """
    cache, parent = cache_of(asked, results), temporary_of(asked)
    with tempfile.TemporaryDirectory(prefix="finetune-study-", dir=parent, ignore_cleanup_errors=True) as temporary:
        compiled, kept = Path(temporary) / "torch_extensions", cache / "torch_extensions" / _kind(run)
        _copy_ops(kept, compiled)
        packages = ":".join(map(str, sorted(_packages(results, run).glob("[!.]*"))))
        yield (
            variables.of_cache(cache)
            | {"TORCH_EXTENSIONS_DIR": str(compiled), "TMPDIR": temporary}
            | ({"PYTHONPATH": packages} if packages else {})
        )
        _keep_ops(compiled, kept)


def keep_package(built: Path, run: Run, results: Results) -> None:
    """Puts a package that was compiled for the runs of a hardware entry in place: they import it from there.

    It is no cache: no run could make it anew.

    Args:
        built: its folder, as `pip install --target` makes it; its name is the package's.
        run: one of them.
        results: the study's.
    """
    _put(built, _packages(results, run))


def _packages(results: Results, run: Run) -> Path:
    """By what the kernels of a GPU are compiled for; whatever processor they are compiled on."""
    versions = [platform.python_version(), platform.machine(), _version("torch"), run.hardware.gpu]
    return results.packages(run.hardware.name, run_module.digest(versions))


def _kind(run: Run) -> str:
    """Names what compiled ops depend on and their build does not see: `-march=native` and the GPU's kind."""
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    instructions = sorted({line for line in processor if line.startswith(("model name", "flags", "Features"))})
    versions = [platform.python_version(), *(_version(name) for name in ("torch", "deepspeed"))]
    return f"{run.hardware.name}-{run_module.digest([versions, platform.machine(), instructions, run.hardware.gpu])}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _copy_ops(source: Path, target: Path) -> None:
    """With their modification times, by which ninja sees that there is nothing to do."""
    target.mkdir()
    for op in _ops(source):
        try:
            shutil.copytree(op, target / op.name)
        except OSError:  # it was being replaced: it is compiled again
            shutil.rmtree(target / op.name, ignore_errors=True)


def _keep_ops(compiled: Path, kept: Path) -> None:
    """Puts what is new in place for later runs, each op whole or not at all; what fails costs a compilation."""
    for op in _ops(compiled):
        if _libraries(op) == _libraries(kept / op.name):
            continue
        with suppress(OSError):
            _put(op, kept)


def _put(folder: Path, kept: Path) -> None:
    """Puts a copy of a folder below another, whole or not at all."""
    aside = kept / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        shutil.copytree(folder, aside / "new")
        if (kept / folder.name).exists():
            (kept / folder.name).rename(aside / "old")
        (aside / "new").rename(kept / folder.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _ops(folder: Path) -> list[Path]:
    """Ops that were compiled to the end."""
    return [op for op in folder.glob("[!.]*") if _libraries(op) and not (op / BUILDING).exists()]


def _libraries(op: Path) -> dict[str, int]:
    """Compiled libraries of an op, with the time at which each was made in ns."""
    with suppress(OSError):
        return {path.name: path.stat().st_mtime_ns for path in op.glob("*.so")}
    return {}
