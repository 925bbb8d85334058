"""What a check found: all is well, a warning, or something that has to be mended."""

from typing import Literal

from finetune_study.section import Section

Verdict = Literal["ok", "warning", "wrong"]

HERE = "here"
"""Where a finding is that no hardware entry is named in: the machine on which the doctor was called."""


class Finding(Section):
    """One line of the doctor's table."""

    where: str
    """A hardware entry, or `here`."""
    check: str
    verdict: Verdict
    found: str
    mend: str = ""
    """What to do about it; empty where nothing is to be done."""


class Findings:
    """The lines about one place, in the order of the checks."""

    def __init__(self, where: str = HERE) -> None:
        self.where = where
        self.all: list[Finding] = []

    def _add(self, check: str, verdict: Verdict, found: str, mend: str) -> None:
        self.all.append(Finding(where=self.where, check=check, verdict=verdict, found=found, mend=mend))

    def ok(self, check: str, found: str) -> None:
        self._add(check, "ok", found, "")

    def warn(self, check: str, found: str, mend: str) -> None:
        self._add(check, "warning", found, mend)

    def wrong(self, check: str, found: str, mend: str) -> None:
        self._add(check, "wrong", found, mend)

    def wrong_checks(self) -> set[str]:
        """Names of the checks that found something wrong."""
        return {finding.check for finding in self.all if finding.verdict == "wrong"}

    def as_warnings(self) -> list[Finding]:
        """What is wrong, as warnings: nothing of the study depends on this place."""
        return [one.model_copy(update={"verdict": "warning"}) if one.verdict == "wrong" else one for one in self.all]
