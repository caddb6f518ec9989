"""Tests of the errors: attributes, built-in base classes, conversion of OSError and exception groups."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from inco_trio import errors
from inco_trio.cli.exit_codes import UsageError, exit_code
from inco_trio.errors import (
    STRERROR,
    ClosedError,
    ConfigError,
    IncoError,
    InvalidArgumentError,
    LinkNotFoundError,
    PermissionDeniedError,
    ProgramNotFoundError,
    ProxyNotFoundError,
    RecordingError,
    ResourceError,
    UnknownSignalError,
    from_os_error,
    unwrapped,
)


@pytest.mark.parametrize(
    ("error", "builtin", "code"),
    [
        (IncoError, Exception, 70),
        (ClosedError, Exception, 70),
        (UnknownSignalError, LookupError, 70),
        (UsageError, Exception, 2),
        (InvalidArgumentError, ValueError, 2),
        (RecordingError, Exception, 65),
        (LinkNotFoundError, FileNotFoundError, 69),
        (ProxyNotFoundError, FileNotFoundError, 69),
        (ProgramNotFoundError, FileNotFoundError, 69),
        (ResourceError, Exception, 71),
        (PermissionDeniedError, PermissionError, 77),
        (ConfigError, ValueError, 78),
    ],
)
def test_errors_keep_attributes_builtin_base_and_exit_code(
    error: type[IncoError], builtin: type[Exception], code: int
) -> None:
    raised = error(Path("/x"), "is missing")
    assert isinstance(raised, builtin)
    assert (str(raised), raised.subject, raised.reason, exit_code(raised)) == (
        "/x: is missing",
        "/x",
        "is missing",
        code,
    )
    alone = error("is closed")
    assert (str(alone), alone.subject, alone.reason) == ("is closed", "", "is closed")
    copy = pickle.loads(pickle.dumps(raised))  # noqa: S301 - pickled by this test
    assert (type(copy), str(copy), copy.subject, copy.reason) == (error, str(raised), "/x", "is missing")


def test_the_message_ends_with_the_remedy() -> None:
    error = LinkNotFoundError("a0", "no such interface", "--wait-link waits for it")
    assert str(error) == "a0: no such interface; --wait-link waits for it"
    assert (error.reason, error.remedy) == ("no such interface", "--wait-link waits for it")


def test_each_configuration_mistake_is_a_line() -> None:
    error = ConfigError("u.json", ["a: missing", "b: unknown key"])
    assert error.problems == ("u.json: a: missing", "u.json: b: unknown key")
    assert str(error).splitlines() == [*error.problems]
    assert (error.subject, error.reason) == ("u.json", "a: missing\nb: unknown key")
    assert ConfigError("text").problems == ("text",)


ABSENT = ((errno.ENOENT, errno.ENOTDIR), ProxyNotFoundError, "is missing")


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.ENOENT, ProxyNotFoundError, "/x: is missing"),
        (errno.ENOTDIR, ProxyNotFoundError, "/x: is missing"),
        (errno.EACCES, PermissionDeniedError, "/x: cannot be read: Permission denied"),
        (errno.EROFS, PermissionDeniedError, "/x: cannot be read: Read-only file system"),
        (errno.ENOSPC, RecordingError, "/x: cannot be read: No space left on device"),
    ],
)
def test_os_errors_are_converted(number: int, kind: type[IncoError], text: str) -> None:
    raised = OSError(number, os.strerror(number), "/other")
    error = from_os_error(raised, "/x", f"cannot be read: {STRERROR}", ABSENT, otherwise=RecordingError)
    assert (type(error), str(error)) == (kind, text)


def test_error_names_the_limit_of_inotify_instances() -> None:
    error = from_os_error(OSError(errno.EMFILE, os.strerror(errno.EMFILE), "inotify"), "a0")
    assert str(error) == "a0: inotify: limit reached: raise fs.inotify.max_user_instances or ulimit -n"


def test_exception_groups_are_unwrapped() -> None:
    one, other, interrupt = ValueError(), KeyError(), KeyboardInterrupt()
    several = BaseExceptionGroup("", [one, other])
    assert unwrapped(one) is one
    assert unwrapped(ExceptionGroup("", [ExceptionGroup("", [one])]), only=True) is one
    assert unwrapped(ExceptionGroup("", [ExceptionGroup("", [one]), other])) is one
    assert unwrapped(BaseExceptionGroup("", [several]), only=True) is several
    assert unwrapped(BaseExceptionGroup("", [one, BaseExceptionGroup("", [other, interrupt])])) is interrupt


def test_all_errors_define_their_exit_code() -> None:
    names = [name for name in errors.__all__ if name.endswith("Error")]
    unlisted = {name for name in names if exit_code(getattr(errors, name)("x")) == 70}
    assert unlisted == {"IncoError", "ClosedError", "UnknownSignalError"}
