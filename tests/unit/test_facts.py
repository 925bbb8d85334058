from pathlib import Path

from finetune_study import facts


def test_later_facts_replace_and_lists_grow(tmp_path: Path) -> None:
    writer = facts.Facts(tmp_path / "0.jsonl")
    writer.tell(load_seconds=1.0, memory={"peak": 1})
    writer.append("steps", {"step": 1})
    writer.append("steps", {"step": 2})
    writer.tell(memory={"peak": 2})
    writer.ended("completed")
    found = facts.read(tmp_path / "0.jsonl")
    assert found["memory"] == {"peak": 2}
    assert found["steps"] == [{"step": 1}, {"step": 2}]
    assert found["ended"]["how"] == "completed"


def test_the_first_ending_stands(tmp_path: Path) -> None:
    writer = facts.Facts(tmp_path / "0.jsonl")
    writer.ended("device_oom", phase="forward")
    writer.ended("error", cause="while leaving")
    assert facts.read(tmp_path / "0.jsonl")["ended"]["how"] == "device_oom"


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl"
    facts.Facts(path).tell(load_seconds=1.0)
    with path.open("a") as stream:
        stream.write('{"append": "steps", "val')
    assert facts.read(path) == {"load_seconds": 1.0}


def test_a_rank_that_told_nothing(tmp_path: Path) -> None:
    assert facts.read(tmp_path / "none.jsonl") == {}
