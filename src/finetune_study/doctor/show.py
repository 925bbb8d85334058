"""What the doctor says: a table for people, JSON for scripts."""

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune_study.doctor.examine import Examination
from finetune_study.doctor.findings import HERE, Verdict
from finetune_study.doctor.probe import dump

STYLE: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


def table(examination: Examination, console: Console) -> None:
    """One line a check, and what is to be done as the last word."""
    shown = Table("where", "check", "", "found", "how to mend it", show_edge=False, pad_edge=False)
    last = None
    for one in examination.findings:
        if last not in (None, one.where):
            shown.add_section()
        name = "" if last == one.where else one.where
        style = STYLE[one.verdict]
        shown.add_row(name, one.check, f"[{style}]{one.verdict}[/]", escape(one.found), escape(one.mend))
        last = one.where
    console.print(shown)
    console.print(f"\n{summary(examination)}", highlight=False)


def summary(examination: Examination) -> str:
    """How many lines are what, in one."""
    count = {v: sum(one.verdict == v for one in examination.findings) for v in STYLE}
    counted = f"checks: {count['ok']} ok, {count['warning']} warning, {count['wrong']} wrong"
    if count["wrong"]:
        places = dict.fromkeys(one.where for one in examination.findings if one.verdict == "wrong")
        return f"{counted}: mend {', '.join('this machine' if p == HERE else p for p in places)} before you submit runs"
    return counted


def as_json(examination: Examination, description: str | None) -> str:
    """Everything, for scripts.

    Args:
        examination: what was found.
        description: path of the cluster's description, where one was written.
    """
    document = {
        "is_well": examination.is_well,
        "findings": [one.model_dump() for one in examination.findings],
        "jobs": [dump(one) for one in examination.probes],
        "description": description,
    }
    return json.dumps(document, indent=1, ensure_ascii=False)
