"""A study so small that its runs take seconds."""

from typing import Any

TINY_STUDY: dict[str, Any] = {
    "models": {
        "tiny": {
            "weights": "random",
            "architecture": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 384,
                "tie_word_embeddings": True,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 0,
            },
        }
    },
    "hardware": {"cpu": {"device": "cpu", "memory_gib": 2, "max_gpus": 2}},
    "recipes": {"full": {}, "lora": {"lora": {"r": 4}}},
    "grid": [{"targets": "tiny", "hardware": "cpu", "sequence_length": 64, "recipes": ["full", "lora"]}],
    "data": {"num_dialogues": 60, "num_eval_samples": 4, "overlong": "truncate"},
    "training": {"effective_batch_size": 2},
    "protocol": {"num_untimed_steps": 1, "num_timed_steps": 2, "time_limit_minutes": 5},
}
