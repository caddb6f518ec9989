"""Output to the standard streams, which may be closed or full, or may be unable to encode some characters."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import BinaryIO, TextIO

from inco_trio.errors import IncoError, ResourceError
from inco_trio.service.lines import printable, shortened


def open_missing() -> None:
    """Open /dev/null in place of closed standard streams, so that no other file gets descriptor 0, 1 or 2."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # open(2) returns the lowest free descriptor, `fd`.
    if sys.stderr is None:
        # If sys.stderr were None, argparse and print() would write to standard output.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the rest of the process


def output() -> TextIO:
    """Return standard output. Raises ResourceError if it was closed when the process started."""
    if sys.stdout is None:
        raise ResourceError("standard output is closed")
    return sys.stdout


def standard_input() -> BinaryIO:
    """Return standard input. Raises ResourceError if it was closed when the process started."""
    if sys.stdin is None:
        raise ResourceError("standard input is closed")
    return sys.stdin.buffer


def say(*lines: str) -> None:
    """Print `lines`. Escape line breaks and terminal controls in them. Raises the errors of `writing`."""
    say_text(*(printable(line) for line in lines))


def say_text(*texts: str) -> None:
    """Print `texts`, which may contain line breaks and colours.

    Escape only characters that standard output cannot encode. Raises the errors of `writing`.
    """
    out = output()
    encoding = out.encoding or "utf-8"
    with writing():
        out.write("".join(f"{line}\n" for line in texts).encode(encoding, "backslashreplace").decode(encoding))


def say_bytes(text: bytes) -> None:
    """Print `text` unchanged. Raises the errors of `writing`."""
    with writing():
        output().flush()
        output().buffer.write(text)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Convert errors from writes to standard output into ResourceError, except BrokenPipeError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ResourceError(f"standard output: {error.strerror}") from error


def flush() -> None:
    """Flush standard output. Raises the errors of `writing`."""
    if sys.stdout is not None:
        with writing():
            sys.stdout.flush()


def settle() -> None:
    """Discard output that cannot be written. Otherwise the interpreter retries at exit, and exits with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def remark(text: str) -> None:
    """Print a note to standard error."""
    with contextlib.suppress(OSError):
        print(f"inco-trio: {shortened(printable(text))}", file=sys.stderr, flush=True)  # noqa: T201 - not part of the output


def complain(error: IncoError) -> None:
    """Print an error to standard error, one line per problem. If that fails, only the exit code reports the error."""
    with contextlib.suppress(OSError):
        for problem in error.problems:
            print(f"inco-trio: error: {shortened(printable(problem))}", file=sys.stderr)  # noqa: T201 - independent of the log
