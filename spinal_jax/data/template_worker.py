"""Renders chat templates under limits of memory and CPU time. Run as a program; it imports nothing of the package.

A chat template is a program that came with a checkpoint. Jinja's sandbox keeps it from files and attributes but not
from endless loops or from texts of any size, which only a process of its own can be kept from.

Reads JSON lines: first the settings, then one dialogue a line; answers each with {"text"} or {"error"}. The environment
is that of transformers, except that `strftime_now` is a fixed day, so that equal runs give equal tokens.
"""

import datetime
import json
import signal
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

DAY = datetime.datetime(2024, 7, 26)  # what templates that know no date say themselves


class Generation(jinja2.ext.Extension):
    """{% generation %} marks what the assistant says; the text is as without it."""

    tags = {"generation"}  # noqa: RUF012 (as the class that it extends has it)

    def parse(self, parser):
        number = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(number)

    def said(self, caller):
        return caller()


class Dict:
    """`dict` without the attributes of the class."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


def template_environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = DAY.strftime
    made.globals["dict"] = Dict()
    return made


def limit(memory, seconds):
    """At most so many bytes of address space, and a signal that ends the process after so much CPU time."""
    try:
        import resource
    except ImportError:  # Windows has neither
        return lambda: None
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    except (OSError, ValueError):  # macOS refuses some
        sys.stderr.write("no limit of memory\n")
    return lambda: signal.setitimer(signal.ITIMER_PROF, seconds)


def said(error):
    """An exception in one line."""
    if isinstance(error, MemoryError):
        return "it needs more memory than a template may"
    if isinstance(error, RecursionError):
        return "it calls itself without end, or is nested too deeply"
    reason = " ".join(str(error).split())[:300].rstrip(".")
    if isinstance(error, jinja2.TemplateError):
        return reason or type(error).__name__
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def main():
    read, write = sys.stdin.buffer, sys.stdout.buffer

    def answer(**values):
        write.write(json.dumps(values).encode() + b"\n")
        write.flush()

    settings = json.loads(read.readline())
    start = limit(settings["memory"], settings["seconds"])
    start()
    try:
        template = template_environment().from_string(settings["template"])
        answer(text="")
    except Exception as error:
        answer(error=said(error))
        return
    for line in iter(read.readline, b""):
        asked = json.loads(line)
        start()
        try:
            text = template.render(
                messages=asked["messages"],
                tools=None,
                documents=None,
                add_generation_prompt=asked["opening"],
                **settings["variables"],
            )
            if len(text) > settings["largest"] + 4 * len(line):
                raise ValueError(f"it writes {len(text)} characters for a dialogue of {len(line)} bytes")
            answer(text=text)
        except Exception as error:
            answer(error=said(error))


if __name__ == "__main__":
    main()
