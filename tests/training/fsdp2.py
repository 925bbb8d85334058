"""torch's FSDP2 on two ranks of a CPU, where accelerate leaves it out: `python -m tests.training.fsdp2 <what>`.

What: `muon`, or `sqrt` for layers that are checkpointed in groups. The first rank prints the losses of one device and
of the two, as JSON; an error goes its way.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 3
RANKS = 2
MUON: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}


def train(model: Any, what: str, rank: int | None = None) -> list[float]:
    """Losses of a model on all sequences of each step, or on those of a rank and averaged."""
    import torch

    from finetune_study.techniques.muon import muon_with_adamw

    optimizer = muon_with_adamw(model, **MUON) if what == "muon" else torch.optim.AdamW(model.parameters(), 1e-2)
    tokens = torch.randint(0, 384, (STEPS, 4, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in tokens:
        rows = step if rank is None else step[rank::RANKS]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        mean = loss.detach().clone()
        if rank is not None:
            torch.distributed.all_reduce(mean)
            mean /= RANKS
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(mean))
    return losses


def compare(rank: int, what: str, meeting_point: str) -> None:
    """Trains the same model on one device and on the ranks."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune_study.techniques.gradient_checkpointing import checkpointed_layers, join

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=RANKS)
    mesh = torch.distributed.init_device_mesh("cpu", (RANKS,))
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=384,
        use_cache=False,
    )  # fmt: skip
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(LlamaForCausalLM(config).train())
    plain, sharded = models
    if what == "sqrt":
        sharded.gradient_checkpointing_enable({"use_reentrant": False})
        join(checkpointed_layers(sharded), 2, use_reentrant=False)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = [train(plain, what), train(sharded, what, rank)]
    if rank == 0:
        print(json.dumps(losses))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(compare, (sys.argv[1], str(Path(folder) / "ranks")), RANKS)
