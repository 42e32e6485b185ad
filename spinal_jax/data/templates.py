"""Renders dialogues with the chat template of a tokenizer, in a separate process with resource limits.

A template is untrusted code of a checkpoint. Each rendering is limited to 1 GiB of memory, 5 s of CPU time, and a text
length in proportion to the dialogue.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEMORY, SECONDS, LARGEST = 1 << 30, 5, 1 << 20  # bytes, CPU seconds, characters beyond 4 times the dialogue
FEW = 0.05  # share of rows that a template may refuse


class TemplateRefusal(UserError):
    """The template refuses a dialogue."""


class Refusals:
    """Counts rows that a template refuses, and raises UserError if there are too many.

    Attributes:
        count: number of refused rows.
        first: the first of them, with the reason.
    """

    def __init__(self, rows: int):
        self.rows, self.count, self.first = rows, 0, ""

    def add(self, where: str, refusal: TemplateRefusal) -> None:
        """Counts a refused row. Raises UserError if more than 1 in 20 rows are refused."""
        self.count += 1
        self.first = self.first or f"{where}: {refusal}"
        self._check(refusal)

    def merge(self, count: int, firsts: Sequence[str]) -> None:
        """The refusals of all parts of the rows, of each part the first. UserError as from `add`."""
        self.count, self.first = count, next(filter(None, firsts), "")
        self._check(None)

    def _check(self, refusal: TemplateRefusal | None) -> None:
        if self.count > FEW * self.rows:
            many = f" ({self.count} of {self.rows} rows are refused)" if self.count > 1 else ""
            raise UserError(self.first + many) from refusal


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, key: str):
        """`key`: group of settings, for error messages.

        Raises `UserError` if the tokenizer has no valid template.
        """
        template: Any = tokenizer.chat_template
        if isinstance(template, dict):
            if template and "default" not in template:
                raise UserError(
                    f"the tokenizer's chat template fails: there are {', '.join(map(repr, template))}, and none is "
                    f"called 'default'; set {key}.chat_template=false"
                )
            template = template.get("default")
        if not template:
            raise UserError(
                f"{key}.chat_template=true, but this tokenizer has no chat template; set {key}.chat_template=false"
            )
        variables = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        self._settings = json.dumps(
            {
                "template": template,
                "variables": variables,
                "memory": MEMORY,
                "seconds": SECONDS,
                "largest": LARGEST,
            }
        )

    def render(self, turns: Sequence[tuple[str, str]], *, opening: bool) -> str:
        """The text of turns; `opening` adds the start of the reply of the assistant.

        The text includes special tokens: tokenise it without adding any. Raises `TemplateRefusal` if the template fails
        on these turns, and `UserError` if it fails on all turns or exceeds its limits.
        """
        messages = [{"role": role, "content": content} for role, content in turns]
        with _LOCK:
            reply = _worker(self._settings).ask(json.dumps({"messages": messages, "opening": opening}))
        roles = ", ".join(role for role, _ in turns[:8]) + ", ..." * (len(turns) > 8)
        if "error" in reply:
            raise TemplateRefusal(f"the tokenizer's chat template fails on turns ({roles}): {reply['error']}")
        text: str = reply["text"]
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TemplateRefusal(
                f"the tokenizer's chat template fails on turns ({roles}): it writes a lone surrogate"
            ) from error
        return text


class _Worker:
    """The process that renders one template."""

    def __init__(self, settings: str):
        self.settings = settings
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is handled by the main process
        )
        try:
            reply = self.ask(settings)
            if "error" in reply:
                raise UserError(f"the tokenizer's chat template fails: {reply['error']}")
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: str) -> Json:
        """Sends a request and returns the answer. Raises UserError if the process ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the answer says
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if answer.endswith(b"\n"):
            return json.loads(answer)
        code = self._process.wait()
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        why = f"its process ended with {code}" + (f" ({said[-1]})" if said else "")
        if code == -signal.SIGPROF:
            why = f"it takes more than {SECONDS} s"
        elif any("MemoryError" in text for text in said):
            why = "it needs more memory than a template may"
        raise UserError(f"the tokenizer's chat template fails: {why}")

    def close(self) -> None:
        process = self._process
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        process.kill()
        process.wait()


_LOCK = threading.Lock()
_current: _Worker | None = None


def _worker(settings: str) -> _Worker:
    """The process for a template; the last one is reused for the same template."""
    global _current
    if _current is not None and (_current.settings != settings or not _current.alive):
        _close()
    if _current is None:
        _current = _Worker(settings)
    return _current


@atexit.register
def _close() -> None:
    global _current
    if _current is not None:
        worker, _current = _current, None
        worker.close()
