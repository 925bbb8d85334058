"""The user's command `before_submit`: which jobs are submitted, held back, or not needed any more."""

import time
from typing import Any

from snakemake_executor_plugin_submitit import hooks
from snakemake_executor_plugin_submitit.base import Base
from snakemake_executor_plugin_submitit.task import Task


class Holding(Base):
    """Asks it about new tasks at once, and from time to time about those that are held or pending."""

    _next_hook = 0.0

    def _ask_hook(self) -> None:
        command, now = self.settings.before_submit, time.monotonic()
        if command is None:
            return
        new = [task for task in self._in_state("new") if task.submission is None]
        # Who waits for a canary or for room has been asked.
        asked = [task for task in new if not task.is_asked]
        if now >= self._next_hook:
            self._next_hook = now + self.settings.before_submit_interval
            asked = [*new, *self._in_state("held"), *(task for task in self._tasks.values() if task.is_pending)]
        if not asked:
            return
        try:
            verdicts = hooks.before_submit(command, [self._describe(task) for task in asked], self._stop)
        except hooks.HookError as error:
            self.listener.warn(f"{error}\nA hook that fails holds nothing up: the jobs are submitted.")
            verdicts = {}
        for task in asked:
            task.is_asked = True
            self._obey(task, verdicts.get(task.work.key, "submit"))
        self._let_go_of_held()

    def _obey(self, task: Task, verdict: hooks.Verdict) -> None:
        if verdict == "resolved" and (missing := self._missing(task)):
            self.listener.warn(f"{task.work.name}: before_submit calls it resolved, but there is no {missing}")
            verdict = "submit"
        if task.state == "submitted" and (
            verdict == "submit"
            or (verdict == "hold" and not self._may_be_held(task))  # it would come back, at the queue's end
            or not self._withdraw_pending(task)
        ):
            return
        if verdict == "resolved":
            self.listener.say(f"{task.work.name}: resolved by before_submit, not run")
            self._succeed(task, "resolved")
        else:
            task.state = "held" if verdict == "hold" else "new"

    def _describe(self, task: Task) -> dict[str, Any]:
        state = "pending" if task.state == "submitted" else task.state
        return {
            "id": task.work.key,
            "state": state,
            "waited_seconds": round(time.monotonic() - task.since),
            **task.work.description,
        }

    def _may_be_held(self, task: Task) -> bool:
        """Nobody is held for longer than agreed, nor when no job is left that could change the answer."""
        others = any(one is not task and one.state in ("new", "submitted") for one in self._tasks.values())
        return others and time.monotonic() - task.since < 60.0 * self.settings.hold_minutes

    def _let_go_of_held(self) -> None:
        for task in [task for task in self._in_state("held") if not self._may_be_held(task)]:
            task.state = "new"
