import json
from pathlib import Path

import pytest

from finetune_study import config_docs, techniques
from finetune_study.errors import StudyError

CONFIG = Path(__file__).parents[2] / "config"


def test_committed_files_are_in_step() -> None:
    config_docs.generate(CONFIG, check=True)


def test_a_file_out_of_step_names_the_repair(tmp_path: Path) -> None:
    config_docs.generate(tmp_path, check=False)
    (tmp_path / "README.md").write_text("old")
    with pytest.raises(StudyError, match="run `finetune-study config-docs`"):
        config_docs.generate(tmp_path, check=True)


def test_every_field_has_its_line_of_meaning() -> None:
    sections = [section for _, section in config_docs.SECTIONS] + list(techniques.ALL.values())
    missing = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert missing == []


def test_every_technique_says_what_it_does() -> None:
    for technique in techniques.ALL.values():
        assert technique.__doc__
        assert technique.effect
        assert technique.source


def test_schema_accepts_the_shipped_config() -> None:
    import jsonschema
    import yaml

    schema = json.loads((CONFIG / "config.schema.json").read_text(encoding="utf-8"))
    shipped = yaml.safe_load((CONFIG / "config.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(shipped, schema)
    shipped["recipes"]["x"] = {"lora": {"rank": 3}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(shipped, schema)
