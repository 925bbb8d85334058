"""The only place that knows names under ``results/``."""

from dataclasses import dataclass
from pathlib import Path

RESULTS_FOLDER = Path("results")
"""Of a study, in its folder."""


@dataclass(frozen=True)
class RunPaths:
    """Everything that belongs to one run; ``folder`` is enough to repeat it."""

    folder: Path

    @property
    def run_yaml(self) -> Path:
        """Everything that defines the run; its bytes are a function of the run_id."""
        return self.folder / "run.yaml"

    @property
    def record(self) -> Path:
        """Raw facts and the outcome; a source file once it exists."""
        return self.folder / "record.json"

    @property
    def failure(self) -> Path:
        """Why the last try left no outcome; replaced by the next try."""
        return self.folder / "failure.json"

    @property
    def forecast(self) -> Path:
        """What is predicted of the run as long as it waits; measured runs and calibrations refine it."""
        return self.folder / "forecast.json"

    @property
    def prior(self) -> Path:
        """What was predicted when the run was submitted; never changed."""
        return self.folder / "prior.json"

    @property
    def log(self) -> Path:
        """What the supervisor and its ranks printed in the last try."""
        return self.folder / "launch.log"

    def log_of_node(self, node: int) -> Path:
        """What the ranks of one of the run's nodes printed; the first node's is the log."""
        return self.log if node == 0 else self.folder / f"launch-node-{node}.log"

    def rendezvous(self, step: str) -> Path:
        """Where the launchers of a step of SLURM, one on each node, find the first one of them."""
        return self.folder / f"rendezvous-{step}.json"

    @property
    def lock(self) -> Path:
        """Held while a supervisor works in this folder."""
        return self.folder / "launch.lock"

    @property
    def superseded(self) -> Path:
        """Records that a ``remeasure`` replaced."""
        return self.folder / "superseded"

    def request(self, number: int) -> Path:
        """Asks for the run to be measured again, for the `number`th time; gone when that begins."""
        return self.folder / f"remeasure-{number}.request"

    def is_request(self, path: str) -> bool:
        """Whether a path, absolute or not, is that of such a request."""
        name = Path(path)
        return name.parent.name == self.folder.name and name.match("remeasure-*.request")

    def superseded_record(self, number: int) -> Path:
        """The record that the `number`th request replaced."""
        return self.superseded / f"record-{number}.json"

    @property
    def scratch(self) -> Path:
        """Facts of supervisor and ranks of the try that is going on."""
        return self.folder / "ranks"

    @property
    def about(self) -> Path:
        """What the supervisor knew when it started the ranks, for when it can't say so at the end."""
        return self.scratch / "launch.json"

    def rank_facts(self, rank: int) -> Path:
        return self.scratch / f"{rank}.jsonl"

    def memory_snapshot(self, rank: int) -> Path:
        """The allocator's history for PyTorch's memory viewer."""
        return self.folder / f"memory_snapshot_rank{rank}.pickle"


@dataclass(frozen=True)
class Results:
    """The results folder of a study."""

    root: Path

    @classmethod
    def of_run_yaml(cls, run_yaml: Path) -> "Results":
        """The results folder that ``results/runs/<run_id>/run.yaml`` lies in."""
        return cls(run_yaml.absolute().parent.parent.parent)

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def run(self, run_id: str) -> RunPaths:
        return RunPaths(self.runs / run_id)

    def model(self, key: str) -> Path:
        return self.root / "prepared" / "models" / key

    def data(self, key: str) -> Path:
        return self.root / "prepared" / "data" / key

    def op(self, hardware: str, op: str) -> Path:
        """Says that DeepSpeed's compiled op is in the cache of a hardware entry."""
        return self.root / "prepared" / "ops" / hardware / f"{op}.json"

    def packages(self, hardware: str, key: str) -> Path:
        """Packages that were compiled for a hardware entry, each in a folder of its own, absolute."""
        return (self.root / "prepared" / "packages" / f"{hardware}-{key}").absolute()

    def kernel(self, name: str) -> Path:
        """Says that a kernel of the hub is in the cache of downloads."""
        return self.root / "prepared" / "kernels" / f"{name}.json"

    @property
    def cache(self) -> Path:
        """Downloads, caches and compiled ops, where the config names no other folder; may be deleted."""
        return self.root / "cache"

    @property
    def doctor(self) -> Path:
        """Scripts, logs and findings of the doctor's jobs; empty when all was well."""
        return self.root / "doctor"

    @property
    def accounting(self) -> Path:
        """What SLURM's accounting said of the runs' jobs, which it forgets after a while."""
        return self.root / "accounting.json"

    @property
    def forecast(self) -> Path:
        """What every run is expected to need, with the bill."""
        return self.root / "forecast.json"

    @property
    def forecast_parquet(self) -> Path:
        """The same as a table."""
        return self.root / "forecast.parquet"

    @property
    def forecast_csv(self) -> Path:
        """The same for a spreadsheet."""
        return self.root / "forecast.csv"

    @property
    def traces(self) -> Path:
        """Traces of models on fake tensors; may be deleted."""
        return self.root / "prepared" / "traces"

    def calibration(self, hardware: str) -> Path:
        """Rates that a hardware entry was measured at."""
        return self.root / "calibration" / f"{hardware}.json"

    @property
    def outcomes_parquet(self) -> Path:
        return self.root / "outcomes.parquet"

    @property
    def outcomes_csv(self) -> Path:
        return self.root / "outcomes.csv"

    @property
    def comparisons(self) -> Path:
        return self.root / "comparisons.parquet"

    @property
    def recommendations(self) -> Path:
        return self.root / "recommendations.json"

    @property
    def report(self) -> Path:
        return self.root / "report" / "index.html"

    @property
    def figures(self) -> Path:
        return self.root / "report" / "figures"

    @property
    def tables(self) -> Path:
        return self.root / "report" / "tables"

    @property
    def changes(self) -> Path:
        """What changed since an earlier study, by the target `compare`."""
        return self.root / "changes.csv"

    @property
    def summary(self) -> Path:
        """The answer as Markdown, to paste into an issue or a chat."""
        return self.root / "report" / "summary.md"


MANIFEST = "manifest.json"
"""In every prepared folder, written last: what it holds, where it came from, its digest."""
