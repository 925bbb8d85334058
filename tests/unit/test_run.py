from pathlib import Path
from typing import Any

import pytest

from finetune_study import config, plan, run
from finetune_study.errors import ConfigError, RecordError

Raw = dict[str, Any]


def run_ids(raw: Raw) -> list[str]:
    return [one.run.run_id for one in plan.plan(config.parse(raw))]


def test_golden_run_ids(raw: Raw) -> None:
    # A change here means that every lab measures everything again: raise IDENTITY_VERSION and say so, or mend the code.
    assert run_ids(raw) == GOLDEN


GOLDEN = ["tiny_cpux1_s64_b1_full_r1-032722", "tiny_cpux1_s64_b1_lora_r1-9b8401"]


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["hardware"]["cpu"].update(price_usd_per_gpu_hour=3.0),
        lambda raw: raw["hardware"]["cpu"].update(software={"python": "/opt/python"}, max_gpus=7),
        lambda raw: raw["hardware"]["cpu"].update(slurm={"partition": "a", "gpu_model": "b", "stand_in": True}),
        lambda raw: raw.update(report={"title": "Another title", "baseline": "lora"}),
        lambda raw: raw["protocol"].update(time_limit_minutes=99, max_attempts=9, memory_snapshot=True),
        lambda raw: raw["models"].update(other=raw["models"]["tiny"]),
        lambda raw: raw["recipes"].update(other={"zero2": {}}),
        lambda raw: raw["recipes"]["full"].update({"sdpa": {}, "fp32": {}}),
    ],
    ids=["price", "site", "slurm", "report", "limits", "another model", "another recipe", "a default spelled out"],
)
def test_what_does_not_change_a_measurement_changes_no_run_id(raw: Raw, change: Any) -> None:
    before = run_ids(raw)
    change(raw)
    assert run_ids(raw) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["hardware"]["cpu"].update(memory_gib=3),
        lambda raw: raw["training"].update(learning_rate=1e-5),
        lambda raw: raw["protocol"].update(num_timed_steps=3),
        lambda raw: raw["models"]["tiny"]["architecture"].update(hidden_size=128),
        lambda raw: raw["data"].update(seed=1),
    ],
    ids=["budget", "learning rate", "steps", "architecture", "data"],
)
def test_what_changes_a_measurement_changes_every_run_id(raw: Raw, change: Any) -> None:
    before = run_ids(raw)
    change(raw)
    assert not set(run_ids(raw)) & set(before)


def test_changed_technique_setting_touches_its_runs_alone(raw: Raw) -> None:
    before = run_ids(raw)
    raw["recipes"]["lora"]["lora"]["r"] = 8
    after = run_ids(raw)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_settings_that_come_later_change_no_id_at_their_default() -> None:
    from pydantic import Field

    from finetune_study.section import LATER, Section

    class Before(Section):
        old: int = 1

    class After(Section):
        old: int = 1
        new: int = Field(default=2, json_schema_extra=LATER)

    assert run.digest(After().model_dump()) == run.digest(Before().model_dump())
    assert run.digest(After(new=3).model_dump()) != run.digest(Before().model_dump())


def test_run_yaml_holds_the_whole_run(raw: Raw, tmp_path: Path) -> None:
    one = plan.plan(config.parse(raw))[1].run
    path = tmp_path / "run.yaml"
    path.write_text(run.dump(one), encoding="utf-8")
    assert run.load(path) == one
    assert run.dump(run.load(path)) == run.dump(one)


def test_run_yaml_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="can't be read"):
        run.load(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("run_id: 3")
    with pytest.raises(RecordError, match="does not hold a run"):
        run.load(tmp_path / "run.yaml")


def test_data_is_shared_by_runs_that_differ_in_training_alone(raw: Raw) -> None:
    full, lora = (one.run for one in plan.plan(config.parse(raw)))
    assert full.data_key == lora.data_key
    assert full.model_key == lora.model_key


def test_repeats_have_seeds_of_their_own(raw: Raw) -> None:
    raw["protocol"]["repeats"] = 3
    seeds = [one.run.seed for one in plan.plan(config.parse(raw)) if one.run.recipe == "full"]
    assert seeds == [42, 43, 44]


def test_edited_run_yaml_is_refused(raw: Raw, tmp_path: Path) -> None:
    one = plan.plan(config.parse(raw))[0].run
    path = tmp_path / "run.yaml"
    path.write_text(run.dump(one).replace("learning_rate: 0.0004", "learning_rate: 0.5"), encoding="utf-8")
    with pytest.raises(RecordError, match="are not those of its run_id"):
        run.load(path)


def test_number_of_nodes_is_part_of_a_run_where_there_are_several(raw: Raw) -> None:
    before = run_ids(raw)
    raw["grid"][0] |= {"nodes": 1}
    assert run_ids(raw) == before
    assert "nodes" not in run.dump(plan.plan(config.parse(raw))[0].run)
    raw["grid"][0] |= {"num_gpus": 2, "nodes": [1, 2], "recipes": "full"}
    one, two = (planned.run for planned in plan.plan(config.parse(raw)))
    assert one.run_id.startswith("tiny_cpux2_s64_")
    assert two.run_id.startswith("tiny_cpux2n2_s64_")
    assert one.run_id.rsplit("-")[-1] != two.run_id.rsplit("-")[-1]
    assert (one.gpus_per_node, two.gpus_per_node) == (2, 1)


def test_run_yaml_of_several_nodes_is_read_back(raw: Raw, tmp_path: Path) -> None:
    raw["grid"][0] |= {"num_gpus": 2, "nodes": 2, "recipes": "full"}
    one = plan.plan(config.parse(raw))[0].run
    path = tmp_path / "run.yaml"
    path.write_text(run.dump(one), encoding="utf-8")
    assert run.load(path) == one


def test_names_too_long_for_a_folder_are_told(raw: Raw) -> None:
    """The file system counts bytes: a letter of another script takes several."""
    (name,) = raw["models"]
    raw["models"] = {"模" * 80: raw["models"][name]}
    raw["grid"][0]["targets"] = "模" * 80
    with pytest.raises(ConfigError, match="at most 255 bytes"):
        run_ids(raw)
