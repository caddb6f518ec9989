"""Run the checks of tests/kernels/checks on distribution kernels: `python -m tests.kernels [KERNEL...]`, as root.

mmdebstrap builds a Debian system for each kernel, with the built wheel and the tests. QEMU boots the system without a
network and emulates the processor (TCG), so the checks examine loss, order and messages, but never timing.
"""

from __future__ import annotations

import argparse
import json
import select
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs

from netns.hang import HANG
from tests.fresh import find_mirror

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build/kernels"
COPIED = ("tests", "netns", "pyproject.toml")
PARAMETERS = (
    *("root=/dev/vda", "rw", "console=ttyS0", "panic=-1"),
    # A login prompt would hang up the terminal of the checks (vhangup(2)).
    "systemd.mask=serial-getty@ttyS0.service",
    # If the host is busy, the emulated timer is so late that the kernel's timer check causes a panic.
    "no_timer_check",
)
"""Kernel command-line parameters of all boots."""

SLOW_CLOCK = "shift=2"
"""QEMU's option that advances the machine's clock by 4 ns for each instruction, and in real time while it is idle.

On a busy host, the machine's time passes more slowly. Otherwise, its kernel and services would reach their timeouts.
"""

MACHINES = 2
"""Number of machines that run at the same time. Each one uses one CPU."""

SILENCE = 6 * HANG
"""Time in seconds without a report after which a machine counts as hung. pytest ends a hanging check earlier."""

PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "kmod", "python3", "python3-venv", "iproute2", "ethtool", "procps", "util-linux"),
    *("s6", "execline", "strace", "tcpdump", "bindfs", "fuse3", "acl", "e2fsprogs", "nfs-kernel-server", "nfs-common"),
    "qemu-system-misc",
)

# An initramfs with all of Debian's modules does not fit in 128 MiB of memory.
SMALL_INITRAMFS = """
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
echo MODULES=list > "$1/etc/initramfs-tools/conf.d/machine"
printf '%s\\n' virtio_pci virtio_blk ext4 > "$1/usr/share/initramfs-tools/modules.d/machine"
"""


@attrs.frozen
class System:
    """A Debian release and its kernel package."""

    suite: str
    kernel: str = "linux-image-amd64"
    kernel_suite: str | None = None
    """The older release that provides the kernel; None means the same release."""
    lacks: str | None = None
    """Expression of pytest's option `-k` that matches the checks of what the system does not have."""


SYSTEMS = {
    # Landlock needs Linux 5.13.
    "5.10": System(
        "bookworm",
        kernel_suite="bullseye",
        lacks="soft_reboot or with_landlock or (fuse_filesystem_of_a_user and sandbox)",
    ),
    "6.1": System("bookworm", lacks="soft_reboot"),
    "6.12": System("trixie"),
}


@attrs.frozen
class Boot:
    """One boot of a virtual machine and the checks that run in it."""

    name: str
    checks: tuple[str, ...]
    memory: int = 1024
    """Size of the memory in MiB."""
    append: tuple[str, ...] = ()
    """Additional kernel command-line parameters."""
    resets: bool = False
    """Whether a check resets the machine."""


CHECKS = "tests/kernels/checks"
NAMESPACE_TESTS = (
    *("tests/test_link.py", "tests/test_namespace_link.py", "tests/test_link_trust.py", "tests/test_mounts.py"),
    *("tests/test_trust.py", "tests/test_inotify.py", "tests/test_flood.py", "tests/test_peers.py"),
    *("tests/test_unix_link.py", "tests/test_privileges.py", "tests/test_sandbox.py"),
    *(
        f"tests/faults/{name}"
        for name in (
            *("test_directory_faults.py", "test_link_faults.py", "test_mounts.py", "test_queue_faults.py"),
            *("test_registers.py", "test_restart.py", "test_storm.py::test_nothing_is_lost[all]"),
        )
    ),
)
"""The project's tests that depend on the kernel most. The machine has no compiler and no MQTT broker for others."""

LITTLE_MEMORY = (
    *("--disable-plugin-autoload", "--noconftest", "-p", "pytest_timeout", "-p", "netns.fixtures"),
    *("-p", "tests.kernels.checks.conftest"),
)
"""Options with which pytest needs 25 MiB less memory."""


def checks(*names: str) -> tuple[str, ...]:
    return tuple(f"{CHECKS}/{name}" for name in names)


SURVIVES = "check_memory.py::test_the_proxy_survives_a_process_that_takes_all_memory"
S6_INIT = ("init=/opt/project/tests/kernels/s6_init",)
BOOTS = (
    Boot("systemd", checks("check_files.py", "check_clock.py", "check_systemd.py")),
    Boot("link", checks("check_link.py")),
    Boot("namespaces", NAMESPACE_TESTS),
    Boot("reboot", checks("check_reboot.py"), resets=True),
    Boot("s6", checks("check_s6.py"), append=S6_INIT),
    # The services of systemd would need memory.
    Boot("small", (*LITTLE_MEMORY, *checks(f"{SURVIVES}[default]")), memory=128, append=S6_INIT),
    # A locked proxy and pytest together do not fit in 128 MiB.
    Boot("locked", (*LITTLE_MEMORY, *checks(f"{SURVIVES}[locked]")), memory=192, append=S6_INIT),
)


def build_tree(name: str, system: System) -> Path:
    """Install Debian in a directory, unless an earlier run has already done so."""
    tree = WORK / f"{name}.tree"
    if tree.exists():
        return tree
    WORK.mkdir(parents=True, exist_ok=True)
    mirror = find_mirror()
    include = ",".join(PACKAGES)
    sources = [f"deb {mirror} {system.suite} main"]
    hooks = [f"--setup-hook={SMALL_INITRAMFS}"]
    if system.kernel_suite is None:
        include += f",{system.kernel}"
    else:
        # apt prefers newer packages, so only the explicitly requested kernel comes from the older release.
        sources.append(f"deb {mirror} {system.kernel_suite} main")
        hooks.append(f"--customize-hook=chroot $1 apt-get install --yes {system.kernel}/{system.kernel_suite}")
    partial = tree.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # mmdebstrap mounts /proc, /sys and /dev in the directory. If it is killed, its mounts disappear with the namespace.
    command = ["unshare", "--mount", "mmdebstrap", "--mode=root", "--variant=minbase", f"--include={include}", *hooks]
    excluded = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")]
    subprocess.run([*command, *excluded, system.suite, partial, *sources], check=True)
    return partial.rename(tree)


def install(tree: Path) -> None:
    """Install the wheel, its dependencies, pytest and the checks on the system."""
    python = (tree / "usr/bin/python3").readlink().name
    shutil.rmtree(tree / "opt", ignore_errors=True)
    project, environment = tree / "opt/project", tree / "opt/inco-trio"
    project.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, project / name)
    subprocess.run(["chroot", tree, "python3", "-m", "venv", "--without-pip", "/opt/inco-trio"], check=True)
    dist = WORK / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    subprocess.run(["uv", "build", "--quiet", "--wheel", "--out-dir", dist, ROOT], check=True)
    # The virtual machine has no network, so uv on the host installs the packages for the machine's Python version.
    target = (
        "--target",
        environment / f"lib/{python}/site-packages",
        "--python-version",
        python.removeprefix("python"),
    )
    group = ("--group", f"{ROOT}/pyproject.toml:unit")
    subprocess.run(["uv", "pip", "install", "--quiet", *target, *dist.glob("*.whl"), *group], check=True)
    unit = tree / "etc/systemd/system/checks.service"
    unit.write_text((ROOT / "tests/kernels/checks.service").read_text())
    wants = tree / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / unit.name).unlink(missing_ok=True)
    (wants / unit.name).symlink_to(f"../{unit.name}")


def console_of(name: str, start: Boot) -> Path:
    """Return the path of the file that receives the machine's console output."""
    return WORK / f"{name}-{start.name}.console"


def make_image(name: str, tree: Path, start: Boot, expressions: Sequence[str]) -> Path:
    """Create the image of the machine's disk, with the list of the checks to run."""
    image = WORK / f"{name}-{start.name}.ext4"
    selected = [f"-k={' and '.join(f'({expression})' for expression in expressions)}"] if expressions else []
    (tree / "opt/checks").write_text("\n".join((*start.checks, *selected)))
    image.unlink(missing_ok=True)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, image, "4G"], check=True)
    return image


def boot(name: str, tree: Path, start: Boot, image: Path) -> Iterator[dict[str, Any]]:
    """Boot the system, run the checks in it, and yield each report when it arrives."""
    (kernel,), (initrd,) = tree.glob("boot/vmlinuz-*"), tree.glob("boot/initrd.img-*")
    command = [
        *("qemu-system-x86_64", "-machine", "q35", "-cpu", "max", "-accel", "tcg", "-smp", "1", "-monitor", "none"),
        *("-icount", SLOW_CLOCK, "-m", str(start.memory), "-nodefaults", "-display", "none"),
        *(() if start.resets else ("-no-reboot",)),
        *("-kernel", kernel, "-initrd", initrd),
        *("-append", " ".join((*PARAMETERS, *start.append))),
        *("-drive", f"file={image},if=virtio,format=raw,cache=unsafe"),
        *("-serial", f"file:{console_of(name, start)}", "-serial", "stdio"),
    ]
    words = list(map(str, command))
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0) as machine:
        try:
            for line in reports_of(machine):
                report = json.loads(line)
                yield report
                if "exit" in report:
                    return  # QEMU does not end if the machine was suspended before it is switched off.
        finally:
            machine.kill()
            image.unlink()


def reports_of(machine: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield each line that the machine writes to its second serial port.

    Raises TimeoutError if the machine writes nothing for too long.
    """
    assert machine.stdout is not None
    while True:
        if not select.select([machine.stdout], [], [], SILENCE)[0]:
            raise TimeoutError(f"the machine has reported nothing for {SILENCE} s")
        line = machine.stdout.readline()
        if not line:
            return
        yield line


def main() -> int:
    """Run the checks on each kernel, print one report per kernel, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    parser.add_argument("kernel", nargs="*", metavar="KERNEL", help=f"a kernel: {', '.join(SYSTEMS)} (default: all)")
    parser.add_argument("--boot", choices=[start.name for start in BOOTS], help="run only the checks of this boot")
    parser.add_argument("-k", metavar="EXPRESSION", help="run only matching checks, as in pytest")
    arguments = parser.parse_args()
    passed = True
    with ThreadPoolExecutor(MACHINES) as pool:
        for name in arguments.kernel or SYSTEMS:
            tree = build_tree(name, SYSTEMS[name])
            install(tree)
            unwanted = SYSTEMS[name].lacks
            expressions = [*filter(None, (arguments.k, unwanted and f"not {unwanted}"))]
            results = []
            for start in BOOTS:
                if arguments.boot in (None, start.name):
                    image = make_image(name, tree, start, expressions)
                    results.append(pool.submit(report_boot, name, start, boot(name, tree, start, image)))
            for result in results:
                passed &= result.result()
    return not passed


def report_boot(name: str, start: Boot, results: Iterator[dict[str, Any]]) -> bool:
    """Print the results of one boot. Return whether all checks have passed."""
    began = time.monotonic()
    counts = Counter[str]()
    running, ended, complete = "none", "the machine ended before the checks", False
    try:
        for result in results:
            if "exit" in result:
                complete = True
            elif result["outcome"] == "started":
                running = result["check"]
            else:
                counts[result["outcome"]] += 1
                print_result(name, start, result)
    except TimeoutError as error:
        ended = str(error)
    if not complete:
        write(f"{name} {start.name}: {ended} (last check: {running}): see {console_of(name, start)}")
    write(f"{name} {start.name}: {dict(counts)} in {time.monotonic() - began:.0f} s")
    return complete and set(counts) == {"passed"}


def print_result(name: str, start: Boot, result: dict[str, Any]) -> None:
    """Print the outcome of one check, its measurements, and the reason if it has failed."""
    figures = "".join(f", {what} {value}" for what, value in result["figures"])
    check = result["check"].removeprefix(f"{CHECKS}/")
    write(f"{name} {start.name} {result['outcome']:7} {check}{figures}")
    if result["outcome"] != "passed":
        write(result["text"])


def write(text: str) -> None:
    """Print the text immediately, even if standard output is a pipe or a file."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
