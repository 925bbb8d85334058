from pathlib import Path

import pytest

from finetune_study.measure import cgroup


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /sys/fs/cgroup."""
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    return tmp_path


def member_of(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """What /proc/<pid>/cgroup says of this process."""
    original = Path.read_text

    def read_text(self: Path, *arguments: str, **keywords: str) -> str:
        if self.name == "cgroup" and self.parts[1] == "proc":
            return "".join(f"{line}\n" for line in lines)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", read_text)


def fill(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_version_1(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member_of(monkeypatch, "5:cpuset:/", "4:hugetlb,memory:/job/7", "0::/")
    fill(
        mount / "memory" / "job" / "7",
        memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
        memory__limit_in_bytes="314572800\n",
    )
    assert cgroup.oom_kills() == 3
    assert cgroup.memory_limit_bytes() == 300 * 2**20


def test_version_1_without_a_limit(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member_of(monkeypatch, "4:memory:/")
    fill(mount / "memory", memory__oom_control="oom_kill 0\n", memory__limit_in_bytes="9223372036854771712\n")
    assert cgroup.oom_kills() == 0
    assert cgroup.memory_limit_bytes() is None


def test_version_2(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member_of(monkeypatch, "0::/system.slice/job")
    fill(
        mount / "system.slice" / "job",
        memory__events="low 0\nhigh 0\nmax 8\noom 2\noom_kill 1\noom_group_kill 0\n",
        memory__max="max\n",
    )
    assert cgroup.oom_kills() == 1
    assert cgroup.memory_limit_bytes() is None


def test_version_2_with_a_limit_beside_version_1(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member_of(monkeypatch, "3:cpu:/", "0::/job")
    fill(mount / "unified" / "job", memory__events="oom_kill 4\n", memory__max="1024\n")
    assert cgroup.oom_kills() == 4
    assert cgroup.memory_limit_bytes() == 1024


def test_without_a_cgroup_the_machine_counts(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member_of(monkeypatch)
    assert cgroup.oom_kills() == cgroup._counter(Path("/proc/vmstat"))
    assert cgroup.memory_limit_bytes() is None


def test_a_process_that_is_gone() -> None:
    assert cgroup.memory_limit_bytes(pid=2**22 + 1) is None
