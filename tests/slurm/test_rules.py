"""Rules of every kind run on SLURM as they do on one machine."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest

from tests.slurm.cluster import Cluster, attempts, wait_for
from tests.slurm.place import Ended, Place

pytestmark = [pytest.mark.slurm, pytest.mark.long]

ODD_FOLDERS = {
    "local": "local",
    "direct": 'a "folder" of $HOME & 100%j; {braces}',
    "in_job": "it's a folder & 100%j; {braces}",
}
"""Snakemake itself can't run commands in one that is odd in both ways."""
ODD_NAMES = ("a b", "it's", 'say "x"', "$HOME", "a;b&c|d", "-dash", "(x)", "*", "#hash", "100%j", "~", "ü", "a,b=c:d@e")

SHELLS = '''
import os

NAME = {name!r}
ODD = {odd!r}
MAKES = expand("out/{{name}}", name=["environment", "tmpdir", "tmpdir_of_node", "long", "params", "lines", "stdin",
                                     "dash", "inputs"])
FAILS = expand("out/{{name}}", name=["unset", "pipe", "errexit", "redirect"])

rule all:
    default_target: True
    input: MAKES, FAILS, [f"out/odd/{{name}}.txt" for name in ODD]

rule environment:
    output: "out/environment"
    threads: 2
    shell: "env -0 > {{output}}"

rule tmpdir:
    output: "out/tmpdir"
    resources: tmpdir=os.path.abspath("own tmp")
    shell: 'for dir in "$TMPDIR" "$TMP" "$TEMPDIR" "$TEMP"; do test -d "$dir"; basename "$dir"; done > {{output}}'

rule tmpdir_of_node:
    output: "out/tmpdir_of_node"
    resources: tmpdir=lambda wildcards: os.path.abspath("own tmp " + str(len(wildcards))), mem_mb=500
    shell: 'for dir in "$TMPDIR" {{resources.tmpdir:q}}; do test -d "$dir"; basename "$dir"; done > {{output}}'

rule long:
    output: "out/long"
    shell: "echo '" + 200000 * "x" + "' | wc -c > {{output}}"

rule params:
    output: "out/params"
    params: text="it's \\"quoted\\" $HOME `id` \\\\ end", number=3, many=["a b", "c"]
    shell: "printf '%s\\n' {{params.text:q}} {{params.number}} {{params.many:q}} > {{output}}"

rule lines:
    output: "out/lines"
    shell:
        """
        cat > {{output}} <<'END'
        here is $HOME
        END
        for number in 1 2; do
            echo "$number" >> {{output}}  # a comment
        done
        shopt -po errexit nounset pipefail >> {{output}}; umask >> {{output}}  # another one
        """

rule stdin:
    output: "out/stdin"
    shell: "wc -c > {{output}}"

rule dash:
    output: "out/dash"
    resources: shell_exec="sh"
    shell: "readlink /proc/$$/exe > {{output}}; false | true; echo $- $NOT_SET >> {{output}}"

rule inputs:
    input: "in put/it's.txt"
    output: "out/inputs"
    shell: "cat {{input:q}} > {{output}}"

rule odd:
    output: "out/odd/{{what}}.txt"
    shell: "printf '%s\\n' {{wildcards.what:q}} {{output:q}} > {{output:q}}"

rule unset:
    output: "out/unset"
    shell: "echo $NOT_SET > {{output}}"

rule pipe:
    output: "out/pipe"
    shell: "false | true; echo made > {{output}}"

rule errexit:
    output: "out/errexit"
    shell: "false; echo made > {{output}}"

rule redirect:
    output: "out/redirect"
    shell: "echo made > {{output}}; exit 3"
'''
"""Commands for a shell, which run without a second Snakemake."""

OWN_SHELL = """
shell.prefix("export PREFIXED=before; ")
shell.suffix("; echo $PREFIXED after >> out/own")

rule own:
    output: "out/own"
    shell: "false | echo it fails not > {output}; echo end $NOT_SET >> {output}"
"""

OTHERS = """
import os

NAME = {name!r}

rule all:
    default_target: True
    input:
        expand("{{name}}.out", name=[
            "script", "log", "benchmark", "run", "group", "temp", "protected", "directory", "update", "update_fails",
            "touch", "shadow", "checkpoint", "local", "threads", "empty", "forgets", "shell_retries", "run_retries",
            "named"]),
        NAME + "a.named"

rule script:
    output: "script.out"
    log: "logs/script.log"
    threads: 2
    params: text="it's text", number=3
    resources: mem_mb=500
    script: "scripts/script.py"

rule log:
    output: "log.out"
    log: "logs/log.log"
    shell: "echo said | tee {{log}} > {{output}}; echo to the job itself"

rule benchmark:
    output: "benchmark.out"
    benchmark: "logs/benchmark.tsv"
    resources: mem_mb=500
    shell: "touch {{output}}"

rule run:
    output: "run.out"
    params: text=config["text"]
    resources: mem_mb=500
    run:
        shell("echo $OMP_NUM_THREADS > {{output}}")
        with open(output[0], "a") as stream:
            print(params.text, rule, os.environ["SLURM_JOB_ID"], file=stream)

rule first_of_group:
    output: temp("group.temp")
    group: "pair"
    resources: mem_mb=500
    shell: "echo $SLURM_JOB_ID > {{output}}"

rule second_of_group:
    input: "group.temp"
    output: "group.out"
    group: "pair"
    resources: mem_mb=500
    shell: "cat {{input}} > {{output}}; echo $SLURM_JOB_ID >> {{output}}"

rule makes_temp:
    output: temp("temp.temp")
    shell: "echo temporary > {{output}}"

rule temp:
    input: "temp.temp"
    output: "temp.out"
    shell: "cat {{input}} > {{output}}"

rule protected:
    output: protected("protected.out")
    shell: "echo made > {{output}}"

rule directory:
    output: directory("directory.out")
    shell: "mkdir {{output}}; touch {{output}}/file"

rule update:
    input: "newer"
    output: update("update.out")
    shell: "echo after >> {{output}}"

rule update_fails:
    input: "newer"
    output: update("update_fails.out")
    shell: "echo after >> {{output}}; exit 3"

rule touch:
    output: touch("touch.out")
    shell: "true"

rule shadow:
    input: "newer"
    output: "shadow.out"
    shadow: "minimal"
    resources: mem_mb=500
    shell: "touch junk; cat {{input}} > {{output}}"

checkpoint split:
    output: directory("parts")
    shell: "mkdir {{output}}; echo 1 > {{output}}/a; echo 2 > {{output}}/b"

def parts(wildcards):
    folder = checkpoints.split.get().output[0]
    return expand(folder + "/{{part}}", part=glob_wildcards(folder + "/{{part}}").part)

rule checkpoint_is_over:
    input: parts
    output: "checkpoint.out"
    shell: "cat {{input}} | sort > {{output}}"

rule local:
    localrule: True
    output: "local.out"
    shell: "echo ${{{{SLURM_JOB_ID:-no job}}}} > {{output}}"

rule threads:
    output: "threads.out"
    threads: 3
    resources: job_name=NAME + "threads"
    shell: "echo {{threads}} $OMP_NUM_THREADS > {{output}}"

rule empty:
    output: ensure("empty.out", non_empty=True)
    shell: "touch {{output}}"

rule forgets:
    output: "forgets.out"
    shell: "true"

rule shell_retries:
    output: "shell_retries.out"
    retries: 1
    resources: job_name=NAME + "shell_retries", mem_mb=lambda wildcards, attempt: 100 * attempt
    shell: "echo $SLURM_JOB_ID >> begun/shell_retries; exit 3"

rule run_retries:
    output: "run_retries.out"
    retries: 1
    resources: job_name=NAME + "run_retries", mem_mb=lambda wildcards, attempt: 400 + 100 * attempt
    run:
        with open("begun/run_retries", "a") as stream:
            print(os.environ["SLURM_JOB_ID"], file=stream)
        raise ValueError("this rule fails")

rule named_by_its_wildcards:
    output: "{{what}}.named"
    shell: "touch {{output}}"

rule named:
    output: "named.out"
    resources: job_name=NAME + "it's a näme; $HOME " + 300 * "x"
    shell: "touch {{output}}"
"""
"""One of each other kind."""

SCRIPT = """
import os
with open(snakemake.log[0], "w") as stream:
    print("in job", os.environ["SLURM_JOB_ID"], file=stream)
with open(snakemake.output[0], "w") as stream:
    print(snakemake.rule, snakemake.params.text, snakemake.params.number, os.path.basename(os.getcwd()), file=stream)
"""


@dataclass(frozen=True)
class Run:
    """A Snakefile in a folder, and how it ended."""

    place: Place
    ended: Ended

    def text(self, name: str) -> str:
        return self.place.path(name).read_text(encoding="utf-8")

    @property
    def made(self) -> Mapping[str, str]:
        """All that lies under out/."""
        paths = [path for path in self.place.path("out").rglob("*") if path.is_file()]
        return {str(path.relative_to(self.place.folder)): path.read_text(encoding="utf-8") for path in paths}


IN_JOB = ("environment", "tmpdir", "long", "params", "lines", "dash", "odd/a b.txt", "odd/it's.txt", "odd/$HOME.txt")
IN_JOB_FAILS = ("unset", "pipe")
"""Enough of them: each starts a Snakemake. Wildcards with quotes or commas don't reach a Snakemake in a job whole."""

MODES: Mapping[str, tuple[str, ...]] = {
    "local": ("--executor=local", "--cores=8"),
    "direct": (),
    "in_job": (
        *("--submitit-snakemake-in-job", "--submitit-keep-logs", "--default-resources", "mem_mb=500", "runtime=10"),
        *("--", *(f"out/{name}" for name in (*IN_JOB, *IN_JOB_FAILS))),
    ),
}


@pytest.fixture(scope="module")
def shells(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Run]]:
    """The same commands under `--executor local`, as jobs, and in Snakemakes of their own."""
    above = Place(tmp_path_factory.mktemp("shells"))
    places = {mode: above.other(ODD_FOLDERS[mode]) for mode in MODES}
    drivers = {}
    for mode, place in places.items():
        place.snakefile(SHELLS.format(name=place.name, odd=ODD_NAMES))
        place.path("in put").mkdir()
        place.write("in put/it's.txt", "given\n")
        drivers[mode] = place.start(*MODES[mode])
    yield {mode: Run(places[mode], driver.wait()) for mode, driver in drivers.items()}
    above.leave()
    cluster.mend()
    cluster.clear(above.folder)


@pytest.fixture(scope="module")
def others(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    place = Place(tmp_path_factory.mktemp("others"))
    place.snakefile(OTHERS.format(name=place.name))
    place.path("scripts").mkdir()
    place.write("scripts/script.py", SCRIPT)
    for name in ("update.out", "update_fails.out"):
        os.utime(place.write(name, "before\n"), (1e9, 1e9))
    place.write("newer", "newer\n")
    yield Run(place, place.snakemake("--latency-wait=2", "--config", "text=from the command line"))
    place.leave()
    cluster.mend()
    cluster.clear(place.folder)


# --- commands for a shell --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_shell_is_strict(shells: Mapping[str, Run], mode: str) -> None:
    run = shells[mode]
    expected = set(IN_JOB_FAILS) if mode == "in_job" else {"unset", "pipe", "errexit", "redirect"}
    assert run.ended.failed == expected, run.ended.output
    assert not {f"out/{rule}" for rule in run.ended.failed} & set(run.made)


@pytest.mark.parametrize("mode", ["direct", "in_job"])
def test_commands_make_the_same_as_under_the_local_executor(shells: Mapping[str, Run], mode: str) -> None:
    """Temporary folders, long commands, parameters, other shells, odd names."""
    expected, made = dict(shells["local"].made), dict(shells[mode].made)
    assert set(made) == ({f"out/{name}" for name in IN_JOB} if mode == "in_job" else set(expected))
    del made["out/environment"]
    assert made == {path: expected[path] for path in made}
    assert expected["out/long"] == "200001\n"
    assert expected["out/tmpdir"] == 4 * "own tmp\n"
    assert expected["out/tmpdir_of_node"] == 2 * "own tmp 0\n"
    assert {f"out/odd/{name}.txt" for name in ODD_NAMES} <= set(expected)


OF_SNAKEMAKE = (
    *("OMP_NUM_THREADS", "GOTO_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"),
    *("NUMEXPR_NUM_THREADS", "TMPDIR", "TMP", "TEMPDIR", "TEMP"),
)


@pytest.mark.parametrize("mode", ["direct", "in_job"])
def test_command_sees_the_variables_that_it_sees_under_the_local_executor(shells: Mapping[str, Run], mode: str) -> None:
    expected, seen = (
        dict(line.split("=", 1) for line in shells[which].text("out/environment").split("\0") if line)
        for which in ("local", mode)
    )
    assert {name: seen.get(name) for name in OF_SNAKEMAKE} == {name: expected[name] for name in OF_SNAKEMAKE}
    for name in ("_", "PWD", "OLDPWD", "SHLVL"):  # the shell's own
        expected.pop(name, None)
    assert {name: seen.get(name) for name in expected if not name.startswith("SLURM")} == {
        name: value for name, value in expected.items() if not name.startswith("SLURM")
    }
    assert seen["SLURM_JOB_ID"]


def test_plain_commands_start_no_snakemake_and_all_do_where_it_is_asked_for(shells: Mapping[str, Run]) -> None:
    folders = {mode: run.place.ledger.parent / "jobs" for mode, run in shells.items()}
    # Of `direct` those are kept that failed.
    direct = [path.read_text() for path in folders["direct"].glob("*/command.sh")]
    assert len(direct) == len(shells["direct"].ended.failed)
    assert not any("-m snakemake" in command for command in direct)
    in_job = [path.read_text() for path in folders["in_job"].glob("*/command.sh")]
    assert len(in_job) == len(shells["in_job"].made) + len(shells["in_job"].ended.failed)
    assert all("-m snakemake" in command for command in in_job)


def test_keep_logs_keeps_scripts_and_logs_of_what_succeeded(shells: Mapping[str, Run]) -> None:
    run = shells["in_job"]
    folders = list((run.place.ledger.parent / "jobs").iterdir())
    for folder in folders:
        (log,) = folder.glob("log")
        assert re.search(r"^job \d+ on [av]100-\d, ", log.read_text(encoding="utf-8"), re.MULTILINE)
        assert (folder / "job.sh").exists()


def test_logs_of_what_succeeded_are_removed_otherwise(others: Run) -> None:
    folders = list((others.place.ledger.parent / "jobs").iterdir())
    assert len(folders) == len(others.ended.failed) + 2  # two of them were tried twice
    assert not list((others.place.ledger.parent / "ended").iterdir())


def test_prefix_and_suffix_of_the_shell_hold(place: Place) -> None:
    """A prefix takes the place of the strict mode."""
    made = {}
    for mode in ("local", "direct"):
        one = place.other(mode)
        one.snakefile(OWN_SHELL)
        ended = one.snakemake(*MODES[mode])
        assert ended.status == 0, ended.output
        made[mode] = one.path("out/own").read_text()
    assert made["direct"] == made["local"]
    assert made["local"].endswith("\nbefore after\n")


# --- rules of other kinds --------------------------------------------------------------------------------------------


def test_only_what_must_fail_fails(others: Run) -> None:
    assert others.ended.failed == {"update_fails", "shell_retries", "run_retries"}, others.ended.output
    assert others.ended.status == 1


def test_script(others: Run) -> None:
    assert others.text("script.out") == f"script it's text 3 {others.place.folder.name}\n"
    assert re.fullmatch(r"in job \d+\n", others.text("logs/script.log"))


def test_log(others: Run) -> None:
    assert others.text("logs/log.log") == "said\n"


def test_benchmark(others: Run) -> None:
    header, row = others.text("logs/benchmark.tsv").splitlines()
    assert header.startswith("s\th:m:s\tmax_rss")
    assert float(row.split("\t")[0]) >= 0


def test_run(others: Run) -> None:
    assert re.fullmatch(r"1\nfrom the command line run \d+\n", others.text("run.out"))


def test_group_is_one_job(others: Run) -> None:
    first, second = others.text("group.out").split()
    assert first == second
    assert not others.place.path("group.temp").exists()


def test_temporary_output_is_removed(others: Run) -> None:
    assert others.text("temp.out") == "temporary\n"
    assert not others.place.path("temp.temp").exists()


def test_protected_output_is_write_protected(others: Run) -> None:
    assert others.place.path("protected.out").stat().st_mode & 0o222 == 0


def test_directory(others: Run) -> None:
    assert [path.name for path in others.place.path("directory.out").iterdir() if path.name[0] != "."] == ["file"]


def test_updated_output_is_added_to_and_comes_back_when_that_fails(others: Run) -> None:
    assert others.text("update.out") == "before\nafter\n"
    assert others.text("update_fails.out") == "before\n"


def test_touched_output_is_made(others: Run) -> None:
    assert others.text("touch.out") == ""


def test_shadow_keeps_the_folder_clean(others: Run) -> None:
    assert others.text("shadow.out") == "newer\n"
    assert not others.place.path("junk").exists()


def test_checkpoint(others: Run) -> None:
    assert others.text("checkpoint.out") == "1\n2\n"


def test_local_rule_stays_here(others: Run) -> None:
    assert others.text("local.out") == f"{os.environ.get('SLURM_JOB_ID', 'no job')}\n"


def test_threads_are_cpus(others: Run) -> None:
    assert others.text("threads.out") == "3 3\n"
    (attempt,) = others.place.attempts("threads")
    assert "cpu=3," in attempt.tres


def test_what_snakemake_finds_wrong_with_outputs_fails(others: Run) -> None:
    for rule, words in (("empty", "unexpected empty output files"), ("forgets", "some output files are missing")):
        assert re.search(rf" in rule {rule} in file .*\n.*{words}", others.ended.output)
        assert not others.place.path(f"{rule}.out").exists()


@pytest.mark.parametrize(("rule", "memory"), [("shell_retries", [100, 200]), ("run_retries", [500, 600])])
def test_each_try_is_a_job_of_its_own(others: Run, rule: str, memory: list[int]) -> None:
    """Snakemake in a job must not try again by itself."""
    begun = others.place.begun(rule)
    others.place.wait_until_accounted(rule, "FAILED", "FAILED")
    assert begun == [attempt.slurm_id for attempt in others.place.attempts(rule)]
    found = [re.search(r"mem=(\d+)M", attempt.tres) for attempt in others.place.attempts(rule)]
    assert [int(match[1]) for match in found if match] == memory


def test_jobs_are_named_after_rule_and_wildcards_or_as_they_want(others: Run) -> None:
    name = others.place.name
    wait_for(lambda: attempts(f"named_by_its_wildcards_{name}a"), "the job of that name is accounted")
    wait_for(lambda: attempts(f"{name}it_s_a_n_me_HOME_{300 * 'x'}"[:200]), "the job of that name is accounted")
