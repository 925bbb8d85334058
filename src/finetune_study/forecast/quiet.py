"""What libraries say to themselves while a model is traced is not part of a forecast."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

TALKATIVE = ("transformers", "torch._subclasses.fake_tensor", "torch.utils._pytree", "torchao", "bitsandbytes")
"""Loggers. The last three tell, when transformers or peft imports them, of a GPU's kernels, of which none runs here."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings of libraries, as far as they are imported or run inside; errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
