"""How long and how often something is tried again."""

import time

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 60.0
"""Before a SLURM that is busy is asked again; doubled each time."""


class Patience:
    """Asks again, ever more slowly, and not for ever."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._first: float | None = None
        self._pause = FIRST_PAUSE_SECONDS
        self._again_at = 0.0

    @property
    def is_waiting(self) -> bool:
        return time.monotonic() < self._again_at

    @property
    def is_over(self) -> bool:
        return self._first is not None and time.monotonic() - self._first >= self._limit

    @property
    def is_tried(self) -> bool:
        """Whether something failed and has not worked since."""
        return self._first is not None

    def failed(self) -> float:
        """Notes a failure; seconds until the next try."""
        self._first = self._first or time.monotonic()
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        self._again_at = time.monotonic() + pause
        return pause

    def hurry(self) -> None:
        """Something has changed: it may be tried at once."""
        self._again_at = 0.0

    def worked(self) -> None:
        self._first, self._pause, self._again_at = None, FIRST_PAUSE_SECONDS, 0.0
