"""Errors that a user can act on; everything else that is raised is a bug of ours."""

import os


class StudyError(Exception):
    """Something in the user's hands is wrong: what, where, what was given, what is allowed, what to do."""

    def __init__(self, what: str, *, where: str = "", given: object = None, allowed: str = "", do: str = "") -> None:
        self.what, self.do = what, do
        lines = [what]
        if where:
            lines.append(f"  where:   {where}")
        if given is not None:
            lines.append(f"  given:   {given}")
        if allowed:
            lines.append(f"  allowed: {allowed}")
        if do:
            lines.append(f"  do:      {do}")
        super().__init__("\n".join(lines))


class ConfigError(StudyError):
    """The study's configuration does not hold together."""


class DataError(StudyError):
    """A data set is missing, empty, mis-shaped, or does not fit the study."""


class ModelError(StudyError):
    """A model is missing or can't be used as asked."""


class RecordError(StudyError):
    """A run.yaml, record.json or failure.json can't be read."""


class RunFailedError(StudyError):
    """A run ended in something that is not an outcome: a bug, a signal, a lost node."""


class UnfitNodeError(RunFailedError):
    """The node is not what the run asks for; on another one the run may well succeed."""

    nodes: tuple[str, ...] = ()
    """Names of the nodes that are not; empty: this one."""


UNFIT_NODE_STATUS = os.EX_UNAVAILABLE
"""Exit status of a try that ended for an unfit node: 69, "a required resource is unavailable" of sysexits.h."""
