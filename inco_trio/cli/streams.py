"""The standard streams of a command: closed, full, or of an encoding that does not know every character."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from inco_trio.errors import IncoError, ResourceError
from inco_trio.service.lines import printable

__all__ = ["complain", "flush", "open_missing", "output", "remark", "say", "say_bytes", "settle", "writing"]


def open_missing() -> None:
    """Open /dev/null where a standard stream is closed: its number would go to whatever is opened next."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        # Else argparse and print() would take standard output in its place.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the rest of the process


def output() -> TextIO:
    """Standard output. Raises ResourceError if the process was started without."""
    if sys.stdout is None:
        raise ResourceError("standard output is closed")
    return sys.stdout


def say(*lines: str) -> None:
    """Print `lines`; characters that standard output does not know are shown as escapes. Raises as `writing` does."""
    out = output()
    encoding = out.encoding or "utf-8"
    with writing():
        out.write("".join(f"{line}\n" for line in lines).encode(encoding, "backslashreplace").decode(encoding))


def say_bytes(text: bytes) -> None:
    """Print `text` as it is. Raises as `writing` does."""
    with writing():
        output().flush()
        output().buffer.write(text)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Make ResourceError of the refusals of standard output, but for BrokenPipeError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ResourceError(f"standard output: {error.strerror}") from error


def flush() -> None:
    """Bring out what was printed. Raises as `writing` does."""
    if sys.stdout is not None:
        with writing():
            sys.stdout.flush()


def settle() -> None:
    """Give up what could not be written: the interpreter would try again when it ends, and make its exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def remark(text: str) -> None:
    """Print on standard error what a person wants to know and a script does not have to."""
    with contextlib.suppress(OSError):
        print(f"inco-trio: {printable(text)}", file=sys.stderr, flush=True)  # noqa: T201 - beside the output


def complain(error: IncoError) -> None:
    """Print an error on standard error, one line for each of its problems; where that is full, the exit code tells."""
    with contextlib.suppress(OSError):
        for problem in getattr(error, "problems", (str(error),)):
            print(f"inco-trio: error: {printable(problem)}", file=sys.stderr)  # noqa: T201 - before and beside the log
