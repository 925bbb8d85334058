"""What torch.compile makes of a model in a run is what it makes of it in a bare transformers.Trainer."""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from benchmarks import overhead

from finetune_study import facts, variables
from tests.training.lab import LIMIT_SECONDS, Lab

pytestmark = [pytest.mark.training, pytest.mark.long]

COMPILED: dict[str, Any] = {"torch_compile": {"torch_compile_backend": "aot_eager"}}

LOGGED = {"TORCH_LOGS": "graph_breaks,recompiles,graph_code"}
"""https://docs.pytorch.org/docs/stable/logging.html"""


def programs(command: list[str], chosen: dict[str, str]) -> Counter[str]:
    """How often Dynamo said what, in a process that trains."""
    ended = subprocess.run(
        command, env=chosen | LOGGED, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return Counter(re.findall("TRACED GRAPH|Graph break in user code|Recompiling function", ended.stderr))


@pytest.mark.parametrize("beside", [{}, {"bf16": {}, "gradient_checkpointing": {}}], ids=["alone", "checkpointed"])
def test_instruments_break_no_graph(lab: Lab, tmp_path: Path, beside: dict[str, Any]) -> None:
    """Without an evaluation the first step is the first call of the model, and every probe is in place."""
    run = lab.run(COMPILED | beside, data={"num_eval_samples": 0})
    paths = lab.prepare(run)
    chosen = variables.passed_on(os.environ) | variables.set_for(run, 1, os.environ)
    chosen |= {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    ours = programs(overhead.ours(run, lab.results), chosen)
    assert ours == programs(overhead.bare(run, lab.results), chosen) == {"TRACED GRAPH": 1}
    told = facts.read(paths.rank_facts(0))
    assert told["compute_dtype"] == ("bfloat16" if beside else "float32")
    assert all(step["real_tokens"] > 0 for step in told["steps"])
    assert {"forward", "backward", "optimizer"} <= set(told["memory"]["peak_device_used_bytes_by_phase"])
