"""The units that `inco-trio s6 --systemd` prints. See systemd.service(5), systemd.exec(5) and systemd.syntax(7)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from hashlib import blake2b

from inco_trio.service.descriptions import PREFIX, Service, account_of, template
from inco_trio.service.lines import printable

__all__ = ["systemd_unit"]


def systemd_unit(*, service: Service, user: str | None, program: Sequence[str]) -> str:
    """Return a unit that runs `service` as `user` (default: root) with `program`. Raises InvalidArgumentError."""
    command = " ".join(map(_quote_word, (*program, *service.words, "--log-format", "text")))
    directives = template("client.directives")
    if not service.is_client:
        directives = template("held.directives").format(rights=service.rights, namespaces=service.namespaces)
        if service.words[0] == "run":
            directory = _directory(service.label)
            directives += template("runtime.directives").format(directory=directory)
            command += f" --control %t/inco-trio/{directory}/control.sock"
    return template("unit.service").format(
        name=printable(PREFIX + service.label),
        of=_quote_text(service.of),
        program=command,
        user=_quote_text("root" if user is None else account_of(user).pw_name),
        directives=directives,
    )


def _directory(label: str) -> str:
    """Return the name of a runtime directory: the label if it is short and needs no quoting, otherwise its hash."""
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
