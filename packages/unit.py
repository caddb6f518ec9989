"""Write the packages' systemd unit `inco-trio@.service`: `python -m packages.unit`. The instance name is the link."""

from __future__ import annotations

import re
from pathlib import Path

from inco_trio.service.descriptions import USER, link_service
from inco_trio.service.systemd import systemd_unit

PATH = Path(__file__).with_name("inco-trio@.service")


def unit() -> str:
    """Return the unit that `inco-trio service systemd` prints, with %i in place of the link."""
    service = link_service("LINK", Path("/etc/inco-trio/LINK.json"))
    text = systemd_unit(service=service, user=USER, program=["/usr/bin/inco-trio"])
    # Omit the first comments: they mention a different path, and commands that the package has already run.
    return re.sub(r"\bLINK\b", "%i", text[text.index("[Unit]") :]).rstrip("\n") + "\n"


if __name__ == "__main__":
    PATH.write_text(unit())
