from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_study import config
from finetune_study.errors import ConfigError

Raw = dict[str, Any]


def refusal(raw: Raw) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(raw)
    return str(caught.value)


def test_axes_of_the_grid_take_one_value_or_a_list(raw: Raw) -> None:
    block = config.parse(raw).grid[0]
    assert block.targets == ["tiny"]
    assert block.recipes == ["full", "lora"]
    assert block.num_gpus == [1]


def test_recipe_may_be_a_list_of_names(raw: Raw) -> None:
    raw["recipes"]["both"] = ["zero2", "lora"]
    assert config.parse(raw).recipes["both"] == {"zero2": {}, "lora": {}}


def test_unknown_key_names_its_place_and_the_nearest_key(raw: Raw) -> None:
    raw["models"]["tiny"]["weigths"] = "random"
    message = refusal(raw)
    assert "models.tiny.weigths: unknown key (did you mean `weights`?)" in message
    assert "name_or_path, weights, revision" in message


def test_unknown_key_at_the_top_and_in_a_nested_section(raw: Raw) -> None:
    raw["protcol"] = {}
    raw["grid"][0]["sequence_lenght"] = 3
    message = refusal(raw)
    assert "protcol: unknown key (did you mean `protocol`?)" in message
    assert "grid.0.sequence_lenght: unknown key (did you mean `sequence_length`?)" in message


def test_unknown_technique_names_the_nearest(raw: Raw) -> None:
    raw["recipes"]["x"] = ["lorra"]
    message = refusal(raw)
    assert "recipe `x`: unknown technique `lorra` (did you mean lora" in message


def test_unknown_setting_of_a_technique_names_the_settings(raw: Raw) -> None:
    raw["recipes"]["x"] = {"lora": {"rank": 3}}
    message = refusal(raw)
    assert "recipe `x`: settings of `lora`: rank" in message
    assert "r, lora_alpha" in message


def test_contradictory_techniques(raw: Raw) -> None:
    raw["recipes"]["x"] = ["zero2", "zero3"]
    assert "recipe `x`: `zero2` and `zero3` contradict each other: both are sharding" in refusal(raw)


def test_technique_without_what_it_needs(raw: Raw) -> None:
    raw["recipes"]["x"] = ["offload_optimizer"]
    assert "`offload_optimizer` means nothing without one of zero1, zero2, zero3" in refusal(raw)


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("protocol", "num_timed_steps", 0, "protocol.num_timed_steps: Input should be greater than 0; given: 0"),
        ("training", "learning_rate", -1, "training.learning_rate: Input should be greater than 0; given: -1"),
        ("training", "lr_scheduler_type", "liner", "'linear', 'cosine'"),
        ("data", "num_eval_samples", -2, "data.num_eval_samples"),
        ("data", "overlong", "cut", "'error', 'truncate' or 'drop'"),
    ],
)
def test_value_out_of_range(raw: Raw, section: str, key: str, value: object, words: str) -> None:
    raw[section][key] = value
    assert words in refusal(raw)


def test_negative_and_zero_axes_are_refused(raw: Raw) -> None:
    raw["grid"][0]["sequence_length"] = [64, -1]
    raw["grid"][0]["num_gpus"] = 0
    message = refusal(raw)
    assert "grid.0.sequence_length.1" in message
    assert "grid.0.num_gpus.0" in message


@pytest.mark.parametrize(("axis", "name"), [("targets", "tinny"), ("hardware", "cpuu"), ("recipes", "loraa")])
def test_name_that_is_not_defined(raw: Raw, axis: str, name: str) -> None:
    raw["grid"][0][axis] = name
    assert f"grid block 1, {axis}: `{name}` is not defined" in refusal(raw)
    assert "did you mean" in refusal(raw)


@pytest.mark.parametrize("axis", ["targets", "hardware", "recipes", "sequence_length", "num_gpus"])
def test_empty_axis_is_refused(raw: Raw, axis: str) -> None:
    raw["grid"][0][axis] = []
    assert f"grid.0.{axis}: Value should have at least 1 item" in refusal(raw)


def test_model_needs_exactly_one_source(raw: Raw) -> None:
    raw["models"]["tiny"]["name_or_path"] = "somewhere"
    assert "either `name_or_path` or `architecture`" in refusal(raw)


def test_architecture_has_no_pretrained_weights(raw: Raw) -> None:
    raw["models"]["tiny"]["weights"] = "pretrained"
    assert "`architecture` has no weights" in refusal(raw)


def test_name_that_cannot_be_a_folder(raw: Raw) -> None:
    raw["models"]["Llama 2/7B"] = raw["models"]["tiny"]
    assert "can't be a folder's name" in refusal(raw)


@pytest.mark.parametrize("name", ["模型-ü", "हिन्दी-7b", "ß.1", "4-й"])
def test_a_name_may_be_of_any_script(raw: Raw, name: str) -> None:
    raw["models"][name] = raw["models"]["tiny"]
    assert name in config.parse(raw).models


ODD_NAMES = ["Über", "u\N{COMBINING DIAERESIS}ber", "a_b", "a/b", "..", "", "\N{GRINNING FACE}", "a\u200bb", "a\nb"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_has_one_way_of_writing(raw: Raw, name: str) -> None:
    """Not composed of two characters where one is meant, nothing that is not seen, no path, nothing of upper case."""
    raw["models"][name] = raw["models"]["tiny"]
    assert "can't be a folder's name" in refusal(raw)


def test_all_problems_come_in_one_message(raw: Raw) -> None:
    raw["protcol"] = {}
    raw["training"]["learning_rate"] = -1
    assert "2 problem(s)" in refusal(raw)


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        config.load(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("models: [")
    with pytest.raises(ConfigError, match="not YAML"):
        config.load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="not a mapping"):
        config.load(tmp_path / "list.yaml")


def test_shipped_config_is_valid() -> None:
    path = Path(__file__).parents[2] / "config" / "config.yaml"
    assert config.parse(yaml.safe_load(path.read_text(encoding="utf-8"))) == config.load(path)


@pytest.mark.parametrize(
    ("hardware", "words"),
    [
        ({"device": "cuda", "slurm": {"stand_in": True, "gpu_model": "a100"}}, "`slurm.stand_in` trains on the CPU"),
        ({"slurm": {"stand_in": True}}, "`slurm.stand_in` needs `slurm.gpu_model`, or `gpu`"),
        (
            {"slurm": {"gpu_model": "a100"}},
            "a run on the CPU asks SLURM for no GPU: leave out `slurm.gpu_model`, or set",
        ),
        ({"device": "cuda", "slurm": {"gpu_model": "a100:8"}}, "slurm.gpu_model: String should match pattern"),
        ({"slurm": {"partitoin": "a100"}}, "slurm.partitoin: unknown key (did you mean `partition`?)"),
        ({"slurm": {"startup_minutes": -1}}, "slurm.startup_minutes: Input should be greater than or equal to 0"),
        ({"software": {"conda": "x", "python": "y"}}, "`conda` brings its own Python"),
        ({"software": {"conda": "x", "apptainer": "y"}}, "`conda` brings its own Python"),
        ({"software": {"apptainer_args": ["--bind", "/x"]}}, "`apptainer_args` mean nothing without `apptainer`"),
    ],
)
def test_hardware_that_contradicts_itself(raw: Raw, hardware: Raw, words: str) -> None:
    raw["hardware"]["cpu"] |= hardware
    message = refusal(raw)
    assert "hardware.cpu" in message
    assert words in message


def test_stand_in_and_software_that_go_together(raw: Raw) -> None:
    raw["hardware"]["cpu"] |= {
        "slurm": {"gpu_model": "a100", "stand_in": True, "partition": "a100"},
        "software": {"modules": "apptainer/1.3", "apptainer": "/images/x.sif", "python": "/opt/env/bin/python"},
    }
    entry = config.parse(raw).hardware["cpu"]
    assert entry.software.modules == ["apptainer/1.3"]
    assert entry.slurm.cpus_per_gpu == 8
