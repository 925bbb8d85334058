"""The peer of benchmarks/overhead.py: transformers.Trainer as anybody would write it, with nothing of ours.

    python benchmarks/bare.py MODEL_FOLDER DATA_FOLDER ARGUMENTS_JSON

Prints the seconds of each optimizer step, as a Trainer callback sees them, and the process's largest resident size.
"""

import json
import resource
import sys
import tempfile
import time
from typing import Any

import datasets
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)


class Clock(TrainerCallback):  # type: ignore[misc]
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.at.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.at.append(time.perf_counter())


def main(model_folder: str, data_folder: str, arguments: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    model.config.use_cache = False
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        Trainer(
            model=model,
            args=TrainingArguments(output_dir=output, **arguments),
            train_dataset=datasets.load_from_disk(data_folder).with_format("torch"),
            data_collator=default_data_collator,
            callbacks=[clock],
        ).train()
    seconds = [end - begin for begin, end in zip(clock.at, clock.at[1:], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
