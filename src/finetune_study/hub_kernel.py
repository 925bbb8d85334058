"""Kernels of the hub that a recipe names: fetched in prepare, since runs are offline.

The package kernels looks for them in the hub's cache, under the branch that transformers asks for.
"""

import json
import os
from pathlib import Path

from finetune_study.errors import StudyError
from finetune_study.prepared import first_line, say
from finetune_study.record import write_atomically
from finetune_study.run import Run


def kernels_of(run: Run) -> list[str]:
    """Hub ids of the kernels that a run's recipe names."""
    named = (getattr(technique, "hub_kernel", None) for technique in run.parsed_techniques.values())
    return [name for name in named if name is not None]


def prepare(name: str, output: Path) -> None:
    """Fetches a kernel, all its builds, into the cache of downloads that runs are given (finetune_study.places.enter).

    Args:
        name: its hub id, `owner/name`.
        output: says that it is there, and its commit.

    Raises:
        StudyError: where it can't be fetched.
    """
    from huggingface_hub import snapshot_download
    from transformers.integrations.hub_kernels import get_attn_kernel_version

    version = f"v{get_attn_kernel_version(name)}"
    # Not the user's own HF_HOME: runs do not see it.
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "huggingface" / "hub"
    say(f"kernel: downloading {name}, {version}")
    try:
        found = snapshot_download(name, repo_type="kernel", revision=version, allow_patterns="build/*", cache_dir=cache)
    except Exception as error:  # the hub's client raises dozens of classes, its HTTP library's among them
        raise StudyError(
            "The kernel can't be fetched from the hub",
            where=f"hub_kernel: {name}, {version}",
            given=first_line(error),
            do="check name and network; or leave out hub_kernel, and install the package where the runs are trained",
        ) from None
    write_atomically(output, json.dumps({"kernel": name, "version": version, "commit": Path(found).name}) + "\n")
