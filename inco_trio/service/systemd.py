"""Create units for `inco-trio service systemd`. See systemd.service(5), systemd.exec(5) and systemd.syntax(7)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from inco_trio.service.descriptions import PREFIX, Service, template
from inco_trio.service.lines import printable

__all__ = ["runtime_directory", "systemd_unit"]

_OF_SANDBOX = ("capset", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")
"""System calls that set up the sandbox and that the unit's filter would otherwise forbid."""


def systemd_unit(*, service: Service, user: str | None, program: Sequence[str], options: Sequence[str] = ()) -> str:
    """Return a unit that runs `service` as `user` (default: root) with `program` and additional `options`."""
    command = _command(*program, *service.words, *options, "--log-format", "text")
    reload = "ExecReload=kill -HUP $MAINPID\n"
    directives, calls = template("client.directives"), ""
    if not service.is_client:
        limits = ["LimitMEMLOCK=infinity\n"] if "--lock-memory" in options else []
        if "--wait-link" in service.words:
            limits.append("# The start waits for a link that does not exist yet.\nTimeoutStartSec=infinity\n")
        directives = template("held.directives").format(
            rights=service.rights, namespaces=service.namespaces, limits="".join(limits)
        )
        if service.words[0] == "run":
            directory = runtime_directory(service.label)
            directives += template("runtime.directives").format(directory=directory)
            control = f"--control %t/inco-trio/{directory}/control.sock"
            command += f" {control}"
            # Unlike SIGHUP, this command waits for the result and fails if the proxy refuses the configuration.
            reload = f"ExecReload={_command(*program, 'reload')} {control}\n"
            # The proxy drops capabilities and enters its own sandbox.
            calls = f"SystemCallFilter={' '.join(_OF_SANDBOX)}\n"
    return template("unit.service").format(
        name=printable(PREFIX + service.label),
        account=template("account.comment").format(user=printable(user)) if user not in (None, "root") else "",
        of=_quote_text(service.of),
        program=command,
        reload=reload,
        user=_quote_text(user or "root"),
        private_tmp="no" if _uses(service, program, "/tmp", "/var/tmp") else "yes",  # noqa: S108 - this creates no files
        protect_home=_home(service, program),
        calls=calls,
        directives=directives,
    )


def _command(*words: str) -> str:
    return " ".join(map(_quote_word, words))


def _home(service: Service, program: Sequence[str]) -> str:
    """Return the value of ProtectHome=. The registers must stay writable, and the program must stay readable."""
    homes = ("/home", "/root", "/run/user")
    if _uses(service, (), *homes):
        return "no"
    return "read-only" if _uses(service, program, *homes) else "yes"


def _uses(service: Service, program: Sequence[str], *directories: str) -> bool:
    """Return whether the service or the program uses files below one of the directories."""
    used = [*service.paths, *map(Path, program[:1])]
    if program[:1] == [sys.executable]:
        used += [Path(sys.prefix), Path(sys.base_prefix), Path(__file__)]
    used += [path.resolve() for path in used]  # The Python in a virtual environment is a symlink.
    return any(path.is_relative_to(directory) for path in used for directory in directories)


def runtime_directory(label: str) -> str:
    """Return the name of a runtime directory: the label if it is short and has only safe characters, else its hash."""
    if re.fullmatch(r"[A-Za-z0-9_@-][A-Za-z0-9_.@-]{0,31}", label):
        return label
    return blake2b(os.fsencode(label), digest_size=8).hexdigest()


def _quote_text(text: str) -> str:
    """Escape line breaks, NUL, backslashes and % in `text`, because systemd would interpret them."""
    return printable(text.replace("\\", "\\x5c")).replace("%", "%%")


def _quote_word(text: str) -> str:
    """Quote `text` as one word of ExecStart=; see "Command lines" in systemd.service(5)."""
    text = text.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[\w@%+=:,./$-]+", text, re.ASCII):
        return text
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    # A unit is UTF-8 text without control characters. Write all other bytes as C escapes.
    return '"' + re.sub(r"[\0-\x1f\x7f\udc80-\udcff]", _escape, text) + '"'


def _escape(match: re.Match[str]) -> str:
    return f"\\x{os.fsencode(match[0])[0]:02x}"
