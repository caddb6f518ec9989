"""Draw the diagrams of the pages: `python -m docs.diagrams` writes docs/images/*.svg."""

from __future__ import annotations

from html import escape
from pathlib import Path

__all__ = ["DIAGRAMS", "IMAGES"]

IMAGES = Path(__file__).parent / "images"
INK, PAPER, CORE0, CORE1, PROXY, KEPT = "#1f2933", "#ffffff", "#e3f0fb", "#fdebd8", "#e2f4e5", "#fff6cf"


class Diagram:
    """An SVG diagram of boxes and arrows. Its light background keeps it readable on dark pages, too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" '
                f'role="img" font-family="system-ui, sans-serif" font-size="14" fill="{INK}">'
            ),
            f"<title>{escape(title)}</title>",
            (
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
                f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>'
            ),
            f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>',
        ]

    def text(self, x: float, y: float, *lines: str, anchor: str = "middle", bold: bool = False) -> None:
        """Draw lines of text. With `bold`, the first line is bold."""
        for number, line in enumerate(lines):
            weight = ' font-weight="bold"' if bold and not number else ""
            self._parts.append(
                f'<text x="{x}" y="{y + 18 * number}" text-anchor="{anchor}"{weight}>{escape(line)}</text>'
            )

    def box(self, x: float, y: float, width: float, height: float, fill: str, *lines: str) -> None:
        """Draw a box with centred text. The first line is bold."""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{INK}"/>'
        )
        self.text(x + width / 2, y + height / 2 + 5 - 9 * (len(lines) - 1), *lines, bold=True)

    def area(self, x: float, y: float, width: float, height: float, fill: str, label: str) -> None:
        """Draw an area with a label at its top."""
        self._parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}"/>')
        self.text(x + 12, y + 22, label, anchor="start", bold=True)

    def arrow(self, x1: float, y1: float, x2: float, y2: float, label: str = "") -> None:
        """Draw an arrow with a label above its middle."""
        self._parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'
        )
        if label:
            self.text((x1 + x2) / 2, (y1 + y2) / 2 - 8, label)

    def svg(self) -> str:
        return "\n".join([*self._parts, "</svg>\n"])


def overview() -> Diagram:
    """Draw how a board's notifications travel in both directions."""
    picture = Diagram(880, 240, "Applications use files on core 0; the proxy exchanges Ethernet frames with core 1")
    picture.area(10, 10, 620, 220, CORE0, "core 0 (Linux)")
    picture.area(720, 10, 150, 220, CORE1, "core 1")
    picture.box(30, 60, 120, 150, PAPER, "application")
    picture.box(260, 60, 150, 60, PAPER, "message_6_trig", "trigger file")
    picture.box(260, 150, 150, 60, PAPER, "message_5_state", "state file")
    picture.box(510, 60, 100, 150, PROXY, "inco-trio", "proxy")
    picture.box(735, 60, 120, 150, PAPER, "other OS", "or firmware")
    picture.arrow(150, 90, 258, 90, "close")
    picture.arrow(410, 90, 508, 90, "inotify")
    picture.arrow(610, 90, 733, 90, "frame")
    picture.arrow(735, 180, 612, 180, "frame")
    picture.arrow(510, 180, 412, 180, "write 1")
    picture.arrow(260, 180, 152, 180, "inotify")
    return picture


def moments() -> Diagram:
    """Draw the stages of a notification: the kernel, the in-flight buffer and the destination."""
    picture = Diagram(880, 300, "Where a notification is: in the kernel, in the in-flight buffer, or finished")
    for y, direction, queue, task, done in (
        (30, "inbound", ("receive queue", "of the socket"), ("proxy", "writes the file"), ("finished:", "file closed")),
        (170, "outbound", ("inotify queue",), ("proxy", "sends the frame"), ("finished:", "link accepted it")),
    ):
        picture.text(20, y + 40, direction, anchor="start", bold=True)
        picture.box(100, y, 150, 70, KEPT, *queue)
        picture.box(310, y, 150, 70, KEPT, "in-flight buffer", "(memfd)")
        picture.box(510, y, 135, 70, PROXY, *task)
        picture.box(695, y, 165, 70, PAPER, *done)
        picture.arrow(250, y + 35, 308, y + 35, "read")
        picture.arrow(460, y + 35, 508, y + 35)
        picture.arrow(645, y + 35, 693, y + 35)
    picture.text(100, 130, "Yellow: a descriptor that the fd store keeps. It outlives the process.", anchor="start")
    picture.text(100, 275, "The buffer is cleared only after the notification is finished.", anchor="start")
    return picture


def restart() -> Diagram:
    """Draw the resources that survive a restart."""
    picture = Diagram(880, 250, "Socket, inotify descriptor and in-flight buffer survive a restart in the fd store")
    picture.box(20, 30, 180, 70, PROXY, "old proxy", "stops or crashes")
    picture.box(680, 30, 180, 70, PROXY, "new proxy", "continues")
    picture.area(20, 140, 840, 95, KEPT, "fd store: s6-fdholder or systemd")
    for x, lines in (
        (50, ("link socket", "frames that arrive")),
        (330, ("inotify", "triggers that are closed")),
        (610, ("in-flight buffer", "what was read, not finished")),
    ):
        picture.box(x, 172, 220, 52, PAPER, *lines)
    picture.arrow(110, 100, 110, 138)
    picture.arrow(770, 138, 770, 100)
    picture.text(440, 60, "no proxy is running:", "the kernel keeps frames and triggers in these descriptors")
    return picture


def fleet() -> Diagram:
    """Draw several hosts, each connected to the same MQTT broker by its gateway."""
    picture = Diagram(880, 330, "The proxies of each host, its gateway, and one MQTT broker for all hosts")
    for number, y in enumerate((10, 170), 1):
        picture.area(10, y, 560, 145, CORE0, f"host {number}")
        picture.box(30, y + 40, 110, 90, CORE1, "boards", "core 1")
        picture.box(210, y + 40, 130, 90, PROXY, "proxies", "inco-trio run")
        picture.box(430, y + 40, 120, 90, PAPER, "gateway", "inco-trio mqtt")
        picture.arrow(140, y + 75, 208, y + 75, "links")
        picture.arrow(340, y + 75, 428, y + 75, "control")
        picture.arrow(550, y + 85, 678, 165 + (number - 1.5) * 20, "")
    picture.box(680, 120, 120, 90, KEPT, "broker", "MQTT 5")
    picture.text(740, 250, "dashboards, tests,", "other programs")
    picture.arrow(740, 232, 740, 212)
    return picture


DIAGRAMS = {"overview": overview, "moments": moments, "restart": restart, "fleet": fleet}
"""The function that draws each diagram, keyed by the file name without its suffix."""


def main() -> None:
    for name, draw in DIAGRAMS.items():
        (IMAGES / f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
