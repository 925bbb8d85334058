"""The cluster's description: hardware entries for all its GPUs, as YAML that loads as a configuration."""

import datetime
import itertools
import re
import textwrap
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_study.allocation import MEMORY_TOLERANCE
from finetune_study.config import Hardware, Slurm
from finetune_study.doctor.entries import Entry
from finetune_study.doctor.limits import gpus_of, memory_of_gpu_gib
from finetune_study.doctor.scheduler import Cluster, Node
from finetune_study.errors import StudyError
from finetune_study.record import write_atomically

UNKNOWN_MEMORY_GIB = 1.0
"""Of an entry of which only SLURM's word is known so far; it is never written down."""

MIG = re.compile(r"\dg\.\d+gb")
"""In the type of a slice of a GPU: `nvidia-smi` tells the memory of the whole."""


@dataclass(frozen=True)
class Place:
    """GPUs of one type in one partition."""

    partition: str
    model: str | None
    nodes: list[Node]

    @property
    def per_node(self) -> int:
        return max(gpus_of(node, self.model) for node in self.nodes)


def drafts(cluster: Cluster, entries: Sequence[Entry]) -> list[Entry]:
    """An entry for each kind of GPU in each partition that no entry of the config describes."""
    known = {(place.partition, place.model) for entry in entries for place in places(cluster, entry)}
    names = {entry.name for entry in entries}
    found = []
    for partition in cluster.partitions:
        for place in _kinds(cluster, partition, None):
            if (partition, place.model) in known:
                continue
            slurm = Slurm.model_validate(_share(cluster, place))
            hardware = Hardware(memory_gib=UNKNOWN_MEMORY_GIB, max_gpus=place.per_node, slurm=slurm)
            name = _free(_name(partition, place.model), names)
            names.add(name)
            found.append(Entry(name, hardware, is_used=False, is_draft=True))
    return found


def _share(cluster: Cluster, place: Place) -> dict[str, Any]:
    """What a run there asks of SLURM for each GPU: its part of the smallest node."""
    share = {
        "partition": place.partition,
        "account": cluster.default_account,
        "gpu_model": place.model,
        "cpus_per_gpu": min(max(1, node.cpus // sum(node.gpus.values())) for node in place.nodes),
        "mem_gib_per_gpu": float(min(map(memory_of_gpu_gib, place.nodes))),
    }
    return {key: value for key, value in share.items() if value is not None}


def _name(*parts: str | None) -> str:
    words = dict.fromkeys(re.sub(r"[^a-z0-9.-]+", "-", part.lower()).strip("-.") for part in parts if part)
    return "-".join(filter(None, words)) or "gpu"


def _free(name: str, taken: Container[str]) -> str:
    """A name that nobody has yet."""
    others = (f"{name}-{number}" for number in itertools.count(2))
    return name if name not in taken else next(other for other in others if other not in taken)


def places(cluster: Cluster, entry: Entry) -> list[Place]:
    """Where the GPUs of an entry are; empty for one that asks for none, or for what is not there."""
    partition = cluster.partition(entry.hardware.slurm.partition)
    if partition is None or not entry.asks_for_gpus:
        return []
    return _kinds(cluster, partition.name, entry.hardware.slurm.gpu_model)


def _kinds(cluster: Cluster, partition: str, model: str | None) -> list[Place]:
    """The types of GPUs of a partition with their nodes; all of them where none is named."""
    nodes = cluster.nodes_of(partition)
    models = [model] if model else sorted({name for node in nodes for name in node.gpus}, key=str)
    return [Place(partition, one, having) for one in models if (having := [n for n in nodes if one in n.gpus])]


def describe(cluster: Cluster, entries: Sequence[Entry], gpus: Mapping[str, list[dict[str, str]]]) -> str:
    """The text of the file.

    Args:
        cluster: as SLURM describes it.
        entries: of the config, and drafts.
        gpus: what `nvidia-smi` said on a node of each entry, by the entry's name.
    """
    today = datetime.date.today().isoformat()
    blocks: list[str] = []
    names = {entry.name for entry in entries if not entry.is_draft}
    is_empty = True
    for entry in entries:
        where = places(cluster, entry)
        if not where:
            continue
        # An entry that names no type where there are several gets any of them.
        place = where[0]
        if len(where) > 1:
            place = Place(place.partition, None, [node for node in cluster.nodes_of(place.partition) if node.gpus])
        body = _body(cluster, entry, place, gpus.get(entry.name, []))
        name = entry.name if not entry.is_draft else _full_name(entry, body, names)
        names.add(name)
        blocks.append(_block(cluster, name, body, place))
        is_empty = is_empty and "memory_gib" not in body
    asked = "`finetune-study doctor --describe`"
    head = (
        f"# Cluster `{cluster.name}`, SLURM {cluster.version}, as {asked} found it on {today}.\n"
        "# Paste the entries into config/config.yaml, or give this file beside it:\n"
        "#   snakemake --profile slurm --configfile <this file>\n"
        "# Prices, and the software of each entry where it is not the Python that runs Snakemake, are yours to add.\n"
    )
    text = (
        head
        + "hardware:\n"
        + "  {}  # delete this line with the first # that you take away\n" * is_empty
        + "\n".join(blocks)
    )
    for name, hardware in yaml.safe_load(text)["hardware"].items():
        assert Hardware.model_validate(hardware), name
    return text


def _body(cluster: Cluster, entry: Entry, place: Place, gpus: list[dict[str, str]]) -> dict[str, Any]:
    """An entry's keys: what the config says, what it leaves open, and what the driver knows better."""
    hardware = entry.hardware
    said: dict[str, Any] = hardware.model_dump(mode="json", exclude_unset=True)
    if entry.is_draft:
        del said["memory_gib"]
    said["slurm"] = _share(cluster, place) | {k: v for k, v in said.get("slurm", {}).items() if v is not None}
    said["max_gpus"] = min(hardware.max_gpus, place.per_node)
    if gpus and hardware.device == "cuda":
        said |= _by_driver(gpus[0], said.get("memory_gib"), place.model)
    order = ("device", "gpu", "memory_gib", "compute_capability", "max_gpus")
    return {key: said[key] for key in order if key in said} | {k: v for k, v in said.items() if k not in order}


def _by_driver(gpu: Mapping[str, str], memory_gib: float | None, model: str | None) -> dict[str, Any]:
    """What the driver says; the memory that a config names stays where it is about right."""
    # Of a slice it names the whole card, which is not what torch calls it.
    said: dict[str, Any] = {} if MIG.search(model or "") else {"gpu": gpu["name"]}
    if "compute_capability" in gpu:
        said["compute_capability"] = float(gpu["compute_capability"])
    if not gpu.get("memory_mib", "").isdigit() or MIG.search(model or ""):
        return said
    found = round(int(gpu["memory_mib"]) / 1024, 1)
    if memory_gib is None or abs(found / memory_gib - 1) > MEMORY_TOLERANCE:
        said["memory_gib"] = found
    return said


def _full_name(entry: Entry, body: Mapping[str, Any], taken: set[str]) -> str:
    """A draft is called by its GPUs: `a100-80gb`; by its partition as well where that is taken."""
    memory = f"{body['memory_gib']:.0f}gb" if "memory_gib" in body else None
    short = _name(entry.hardware.slurm.gpu_model or entry.hardware.slurm.partition, memory)
    return short if short not in taken else _free(_name(entry.name, memory), taken)


def _block(cluster: Cluster, name: str, body: dict[str, Any], place: Place) -> str:
    """An entry with what else is worth knowing; commented out where it would not load."""
    partition = cluster.partitions[place.partition]
    sizes = sorted({(node.cpus, node.memory_mb) for node in place.nodes})
    nodes = ", ".join(f"{cpus} CPUs and {memory / 1024:.0f} GiB" for cpus, memory in sizes)
    notes = [
        f"partition {place.partition}{' (default)' if partition.is_default else ''}: {len(place.nodes)} nodes with "
        f"{place.per_node} GPUs ({place.model or 'no type'}), {nodes}; jobs of at most "
        f"{partition.says.get('MaxTime', 'UNLIMITED')}",
        *([f"your accounts: {', '.join(cluster.accounts)}"] if cluster.accounts else []),
    ]
    qos = sorted({q for row in cluster.associations if row["User"] for q in row["QOS"].split(",") if q})
    if qos:
        notes.append(f"your QOS: {', '.join(qos)}")
    if "memory_gib" not in body:
        notes.append(
            "name it, fill in what `nvidia-smi --query-gpu=name,memory.total,compute_cap --format=csv` says on a node, "
            "and take the # away"
        )
        body = {"gpu": "?", "memory_gib": "?", "compute_capability": "?"} | body
    text = textwrap.indent(yaml.safe_dump({name: body}, sort_keys=False, width=100), "  ")
    if "?" in body.values():
        text = "".join(f"  # {line[2:]}\n" for line in text.splitlines())
    return "".join(f"  # {note}\n" for note in notes) + text


def write(path: Path, text: str, *, force: bool) -> Path:
    """Writes the description, beside a file that is there already unless that may be replaced; where it is now.

    Raises:
        StudyError: when the place can't be written.
    """
    if path.exists() and not force:
        others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
        path = next(other for other in others if not other.exists())
    try:
        write_atomically(path, text)
    except OSError as error:
        raise StudyError("The description can't be written", where=str(path), given=error.strerror) from None
    return path
