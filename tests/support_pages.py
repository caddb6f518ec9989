"""Run the shell blocks of a page, and compare their output with the page.

HTML comments, which readers do not see, control how the blocks are run:

    <!-- file NAME -->      write the next code block to this file instead of running it
    <!-- run COMMANDS -->   run commands that readers do not need, such as a loop that waits for the proxy
    <!-- exit 0 or 3 -->    accept these exit codes from the next block (default: 0)
    <!-- new shell -->      run the following blocks in another directory and shell
    <!-- not run: WHY -->   do not run the next block
    <!-- run by TEST -->    another test runs the next block

The output block that follows a shell block must consist of lines that the commands print. The page may leave out lines;
a line `...` shows this to readers. Numbers, times and addresses may differ.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from inco_trio.simulation.world import Cores, Peer
from netns.hang import HANG
from tests.support_proxy import ADD_USER

__all__ = [
    "DOCS",
    "ROOT",
    "Block",
    "Script",
    "comparable",
    "page_path",
    "page_text",
    "parts",
    "run",
    "scripts",
    "signalling",
]

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PART = re.compile(
    r"^<!-- (?P<mark>file|run by|run|exit|new shell|not run:)\s*(?P<value>.*?)\s*-->$"
    r"|^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# s6-svscan never ends if SIGTERM arrives while a command of `s6-svscanctl -an` waits in its FIFO. So send `-t` first.
ENDING = """trap 'set +e; [ ! -d /run/service ] || s6-svscanctl -t /run/service
for job in $(jobs -p); do kill $job; wait $job; done' EXIT"""


@attrs.frozen
class Block:
    """A code block on a page, with the mark (HTML comment) before it."""

    page: str
    language: str
    text: str
    mark: str = ""
    value: str = ""


@attrs.define
class Script:
    """The script for one shell of a page, with the text of each block and the output that the page shows for it."""

    page: str
    lines: list[str] = attrs.Factory(list)
    shown: list[tuple[str, str]] = attrs.Factory(list)


def page_path(page: str) -> Path:
    """Return the path of the page with this name: `README` or the name of a file in docs."""
    return (ROOT if page.isupper() else DOCS) / f"{page}.md"


def page_text(page: str) -> str:
    return page_path(page).read_text()


def parts(page: str) -> Iterator[Block]:
    """Yield a page's code blocks and its marks `run` and `new shell` in order. A mark is a Block without text."""
    mark = value = ""
    for found in PART.finditer(page_text(page)):
        if found["mark"] in ("run", "new shell"):
            yield Block(page, "", "", found["mark"], found["value"])
        elif found["mark"]:
            mark, value = found["mark"], found["value"]
        else:
            yield Block(page, found["language"], found["text"], mark, value)
            mark = value = ""


def scripts(page: str) -> list[Script]:
    """Return the scripts of a page, one for each shell."""
    made = [Script(page)]
    before = None
    for block in parts(page):
        script = made[-1]
        if block.mark == "new shell":
            made.append(Script(page))
        elif block.mark == "run":
            script.lines.append(block.value)
        elif block.mark == "file":
            script.lines.append(f"mkdir -p $(dirname {block.value}); cat > {block.value} << 'END_OF_FILE'")
            script.lines.append(f"{block.text}END_OF_FILE")
        elif block.mark in ("not run:", "run by"):
            pass
        elif block.language == "sh":
            text = block.text
            if block.mark == "exit":
                codes = "|".join(re.findall(r"\d+", block.value))
                text = f"set +e\n{text}code=$?; set -e\ncase $code in {codes}) ;; *) exit $code ;; esac\n"
            script.lines.append(f"echo '=== {len(script.shown)}'\n{text}echo '==='")
            script.shown.append((block.text, ""))
            before = block
        elif block.language == "text" and before is not None:
            script.shown[-1] = (before.text, block.text)
        if block.language not in ("", "sh"):
            before = None
    return [script for script in made if script.shown]


def run(cores: Cores, home: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script as root on core 0, with inco-trio's programs in `home`.

    The script runs in a directory below a new, empty /run that every user can read. In the script, /run/etc/ replaces
    /etc/. In the output, the directory is called /home/you.
    """
    (home / "bin").mkdir()
    for name, arguments in (
        ("python3", ""),
        ("inco-trio", "-m inco_trio"),
        ("inco_proxy", "-c 'import sys, inco_trio.cli as cli; sys.exit(cli.inco_proxy())'"),
    ):
        program = home / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        program.chmod(0o755)
    script = re.sub(r"--timeout \d+", f"--timeout {HANG}", script).replace("/etc/", "/run/etc/")
    # Hide the control sockets, services and processes of other tests: a proxy may serve a link with the same name.
    enter = 'mount -t tmpfs -o mode=755 inco-trio-test /run && mkdir /run/etc /run/page && cd /run/page && exec "$@"'
    hidden = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", enter, "sh"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{home}/bin:{os.environ['PATH']}", "HOME": str(home)}
    # Do not use pipes: background processes can outlive the script and keep a pipe open.
    outputs = home / "output", home / "errors"
    with outputs[0].open("wb") as output, outputs[1].open("wb") as errors:
        shell = subprocess.Popen(
            [*hidden, "/bin/bash", "-c", f"set -e\n{ADD_USER}{ENDING}\n{script}"],
            stdout=output, stderr=errors, preexec_fn=cores.core0.enter, env=environment, process_group=0,
        )  # fmt: skip
    try:
        shell.wait(HANG)
    except BaseException as error:
        os.killpg(shell.pid, signal.SIGKILL)  # This also ends the background processes of the script.
        shell.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        said = "".join(path.read_text() for path in outputs)
        raise AssertionError(f"the script does not end:\n{said}") from None
    out, err = (path.read_text() for path in outputs)
    out = out.replace("/run/etc/", "/etc/").replace("/run/page", "/home/you")
    return subprocess.CompletedProcess(shell.args, shell.returncode, out, err)


@contextmanager
def signalling(core1: Peer) -> Iterator[None]:
    """Send two signals repeatedly from core 1 while the block runs. Only one of them is in the signal table."""
    stop = threading.Event()

    def send() -> None:
        for name in itertools.cycle((b"something_else", b"ihub_hwwd_irq")):
            core1.send(name)
            if stop.wait(0.05):  # Limit the rate of the signals.
                return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def comparable(text: str) -> set[str]:
    """Return the lines without the parts that vary: numbers, times, addresses, process names and column widths."""
    for varying, constant in (
        # Wireshark replaces the first byte or bytes of some addresses with a name: MS-NLB-PhysServer-22_8a:ff:46:69.
        (r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}|\b[\w-]+_(?:[0-9a-f]{2}:){1,4}[0-9a-f]{2}", "MAC"),
        (r"receive buffer of .*", "BUFFER"),
        (r'"boot": "[0-9a-f]+"', '"boot": "BOOT"'),
        (r"never|[\d.]+ \w+ ago", "WHEN"),
        (r"\d+ min \d+ s|[\d.]+ (?:ms|us|s|min)\b", "TIME"),
        (r"(\d+) \([\w.-]+\)", r"\1 (PROGRAM)"),
        (r"\b\d[\d.]*", "N"),
        (r" +", " "),
    ):
        text = re.sub(varying, constant, text)
    return {line.strip() for line in text.splitlines()}
