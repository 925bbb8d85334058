"""Signals as a supervisor meets them: they wait until it asks, so that it sleeps in between and misses none."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}
"""Signals that end a run from outside: a scheduler's, a terminal's."""

NEWS = {signal.SIGCHLD, signal.SIGIO}
"""A child ended; another node said something (rendezvous.py)."""


class StoppedError(Exception):
    """The run was ended from outside; the message names the signal."""


@contextmanager
def blocked() -> Iterator[None]:
    """In here no signal interrupts; `sleep` fetches them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*NEWS, *STOPS})
    try:
        yield
    finally:
        while signal.sigtimedwait({signal.SIGIO, *STOPS}, 0) is not None:
            pass  # they asked for the end, and this is the end
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def sleep(seconds: float, *, unstoppable: bool = False) -> bool:
    """Sleeps until there is news.

    Args:
        seconds: at most so long.
        unstoppable: leave signals that end a run for later.

    Returns:
        Whether there is any.

    Raises:
        StoppedError: when a signal asks for the end.
    """
    received = signal.sigtimedwait(NEWS if unstoppable else {*NEWS, *STOPS}, max(0.0, seconds))
    if received is not None and received.si_signo in STOPS:
        raise StoppedError(signal.Signals(received.si_signo).name)
    return received is not None
