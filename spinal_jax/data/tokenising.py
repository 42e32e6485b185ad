"""Guards calls of a tokenizer, whose rules come with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from spinal_jax.errors import UserError

_LOCK = threading.Lock()  # standard error belongs to the process
STANDARD_ERROR = 2


@contextlib.contextmanager
def tokenising() -> Iterator[None]:
    """Converts errors of a tokenizer into a UserError: a token for unknown words that is missing, or a panic of its
    Rust code, such as for a regular expression without end. What a panic prints is dropped, unless SPINAL_DEBUG is
    set."""
    try:
        with _LOCK, _quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(_sentence(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of PyO3, which is no Exception
            raise
        raise UserError(_sentence(error)) from error


def _sentence(error: BaseException) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return f"the tokenizer fails on the texts ({reason}); a rule of its tokenizer.json does not fit them"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what is written to the file descriptor of standard error."""
    try:
        kept = os.dup(STANDARD_ERROR) if os.environ.get("SPINAL_DEBUG", "0") in ("", "0") else None
    except OSError:  # it is closed
        kept = None
    if kept is None:
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, STANDARD_ERROR)
        yield
    finally:
        os.dup2(kept, STANDARD_ERROR)
        os.close(nowhere)
        os.close(kept)
