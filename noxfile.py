"""The project's checks: `nox` runs all of them, `nox -l` lists them, `nox -s NAME -- ARGS` runs one."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2026.8.17"
# uv creates an environment from its cache in a second; virtualenv and pip need half a minute.
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True
if len(sys.argv) == 1:
    # Run two of the sessions marked with `side_by_side` at a time: most of their time, they use one CPU or the disk.
    # nox prints the output of a session when it ends. A session that is selected by name runs alone, and prints its
    # output at once.
    nox.options.parallel = 2
side_by_side = nox.session(allow_parallel=True)

PROJECT = nox.project.load_toml("pyproject.toml")
COVERAGE_DATA = Path(".nox/coverage-data").resolve()

NOT_UNIT = "netns or s6 or qemu or tools"
"""pytest's markers of the tests that need more than the package."""

DEBIAN_PACKAGES = {
    "cc": ("gcc", "libc6-dev"),
    "chromedriver": ("chromium-driver",),
    "chromium": ("chromium",),
    "execlineb": ("execline",),
    "fish": ("fish",),
    "inotifywait": ("inotify-tools",),
    "ip": ("iproute2",),
    "man": ("man-db",),
    "make": ("make",),
    "mandoc": ("mandoc",),
    "mosquitto": ("mosquitto",),
    "mosquitto_sub": ("mosquitto-clients",),
    "openssl": ("openssl",),
    "promtool": ("prometheus",),
    "qemu-system-riscv64": ("qemu-system-misc",),
    "riscv64-linux-gnu-gcc": ("gcc-riscv64-linux-gnu",),
    "s6-svscan": ("s6",),
    "setpriv": ("util-linux",),
    "strace": ("strace",),
    "sysctl": ("procps",),
    "systemctl": ("systemd",),
    "tcpdump": ("tcpdump",),
    "tshark": ("tshark",),
    "zsh": ("zsh",),
}

MACHINE_PACKAGES = {
    "mke2fs": ("e2fsprogs",),
    "mmdebstrap": ("mmdebstrap",),
    "qemu-s390x-static": ("qemu-user-static",),
    "qemu-system-x86_64": ("qemu-system-x86",),
}
"""The Debian packages that virtual machines need."""

CONTAINER_PACKAGES = {"mmdebstrap": ("mmdebstrap",), "systemd-nspawn": ("systemd-container",)}
"""The Debian packages that build and boot a Debian system in a container."""

# Compile the tests once. Otherwise, each of the processes that run tests would compile all of them.
COMPILE = ("pytest", "tests", "--collect-only", "-qq")

# Run four tests at a time, each with its own namespaces, directories and sockets. Most tests wait for other processes
# and for the kernel, so two tests at a time would leave a CPU idle. Print the 10 slowest tests.
FOUR_AT_A_TIME = ("-p", "xdist", "-n", "4", "--dist", "worksteal", "--durations", "10")

# Tests in namespaces wait most of the time. While other processes are busy, running more tests in parallel gives the
# tests more CPU time.
EIGHT_AT_A_TIME = (*FOUR_AT_A_TIME, "-n", "8")

# `unit` runs these tests with one Python version only: they check text, statistics, or how the kernel treats files and
# sockets. The other tests depend on the Python version: asyncio, threads, cancellation, Unix signals, standard streams,
# the command line, configuration, the public API and the pytest plugin. A new test file runs with every version unless
# it is added here.
SAME_ON_EACH_PYTHON = (
    *("bench", "test_boards.py", "test_boards_run.py", "test_bundle.py", "test_capture.py", "test_clocks.py"),
    *("test_control.py", "test_design.py", "test_diagnose.py", "test_dissector.py", "test_doctor.py"),
    *("test_doctor_services.py", "test_doctor_silence.py", "test_fdstore.py", "test_frame.py", "test_fresh.py"),
    *("test_history.py", "test_history_command.py", "test_incomplete_store.py", "test_inflight.py"),
    *("test_json_output.py", "test_limits.py", "test_linux.py", "test_mqtt_equal_names.py", "test_mqtt_gateway.py"),
    *("test_mqtt_publishing.py", "test_mqtt_session.py", "test_mutated_memory.py", "test_name_filter.py"),
    *("test_odd_input.py", "test_odd_registers.py", "test_outbound.py", "test_packages.py", "test_pages.py"),
    *("test_playing_core1.py", "test_plot.py", "test_privileges.py", "test_readme.py", "test_recorder.py"),
    *("test_recovery.py", "test_registers.py", "test_registers_calm.py", "test_registers_machine.py"),
    *("test_sandbox.py", "test_scandir.py", "test_services.py", "test_share.py", "test_status_monitor.py"),
    *("test_unix_link.py",),
)

# Debian installs ip, tcpdump and mosquitto in directories that are not on a user's PATH.
os.environ["PATH"] += os.pathsep + os.pathsep.join(("/usr/sbin", "/sbin"))

# Without .pyc files, each of the tests' many processes would compile its imports again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Namespaces and mounts need CAP_SYS_ADMIN, which every user has inside a new user namespace.
AS_ROOT = () if os.geteuid() == 0 else ("unshare", "--user", "--mount", "--map-current-user", "--keep-caps")


def find_pythons() -> dict[str, str]:
    """Map each supported minor version to a working interpreter from PATH or pyenv.

    Finding a file is not enough: pyenv puts a `python3.12` on PATH that fails unless that version is enabled.
    """
    versions = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser() / "versions"
    found: dict[str, str] = {}
    for version in nox.project.python_versions(PROJECT):
        name = f"python{version}"
        for candidate in (sys.executable, name, *map(str, sorted(versions.glob(f"{version}.*/bin/{name}")))):
            if path := works_as(candidate, version):
                found[version] = path
                break
    return found


def works_as(candidate: str, version: str) -> str | None:
    """Return the interpreter's path if it runs, has this version, and has the modules that pip and coverage need."""
    code = "import sqlite3, ssl, sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    try:
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    found, path = done.stdout.strip().split(" ", 1)
    return path if found == version else None


# If no supported version is found, use nox's own Python: otherwise `unit` would pass without running any tests.
PYTHONS = find_pythons() or {"other": sys.executable}


def install(session: nox.Session, *groups: str) -> None:
    """Install the project in editable mode, plus the given dependency groups from pyproject.toml."""
    session.install("-e", ".", *nox.project.dependency_groups(PROJECT, *groups))


def missing_programs(wanted: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """Return the missing programs and the Debian packages that provide them."""
    missing = [program for program in wanted if not shutil.which(program)]
    return missing, [package for program in missing for package in wanted[program]]


def need_programs(session: nox.Session, wanted: Mapping[str, Sequence[str]] = DEBIAN_PACKAGES) -> None:
    """As root, install missing programs with apt-get. Otherwise, fail and name the Debian packages."""
    if os.geteuid() == 0 and shutil.which("apt-get"):
        # Another session may run at the same time, and apt-get fails if another apt-get is running.
        with Path(session.virtualenv.location).with_name("apt.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            install_programs(session, *missing_programs(wanted))
    missing, packages = missing_programs(wanted)
    if missing:
        session.error(f"{', '.join(missing)}: not found (install the Debian packages {' '.join(packages)})")


def install_programs(session: nox.Session, missing: Sequence[str], packages: Sequence[str]) -> None:
    """Install the Debian packages of the missing programs, if any."""
    if not missing:
        return
    session.log(f"{', '.join(missing)}: not found (installing {' '.join(packages)})")
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        # Ignore the exit code: `apt-get update` fails if any package source fails. Check for the programs instead.
        session.run_install(
            "apt-get", *command, env={"DEBIAN_FRONTEND": "noninteractive"}, external=True, success_codes=range(256)
        )


def run_pytest(session: nox.Session, *args: str, data: str, root: bool = False, **env: str) -> None:
    """Run pytest and its subprocesses under coverage. The session `coverage` combines the data."""
    COVERAGE_DATA.mkdir(parents=True, exist_ok=True)
    for old in COVERAGE_DATA.glob(f"data.{data}.*"):
        old.unlink()
    session.run(
        *(AS_ROOT if root else ()),
        *("coverage", "run", "-m", "pytest", *args, *(EIGHT_AT_A_TIME if root else FOUR_AT_A_TIME), *session.posargs),
        env={"COVERAGE_FILE": str(COVERAGE_DATA / f"data.{data}"), **env},
        external=root,
    )


@side_by_side
def lint(session: nox.Session) -> None:
    """Check the code with Ruff, the spelling with codespell, and the CI files with zizmor and published schemas."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")
    roots = [Path(), *sorted(Path("examples").iterdir())]
    github = [str(path) for root in roots for path in sorted(root.glob(".github/workflows/*.yml"))]
    gitlab = [str(path) for root in roots for path in root.glob(".gitlab-ci.yml")]
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *github)
    gitlab_schema = ("vendor.gitlab-ci", "--data-transform", "gitlab-ci")
    session.run("check-jsonschema", "--builtin-schema", *gitlab_schema, *gitlab)
    session.run("zizmor", "--offline", "--pedantic", "--strict-collection", "--no-progress", *github)


@side_by_side
def types(session: nox.Session) -> None:
    """Check the types of all Python code with mypy in strict mode."""
    install(session, "types")
    session.run("mypy", "--strict")


@side_by_side
def docs(session: nox.Session) -> None:
    """Build the documentation site in build/docs (warnings are errors), and check it in a headless browser."""
    need_programs(session)
    install(session, "docs", "site")
    session.run("sphinx-build", "-q", "-W", "--keep-going", "-b", "html", "docs", "build/docs", *session.posargs)
    session.run(
        *("pytest", "--confcutdir=tests/site", "tests/site/check.py"),
        env={"INCO_TRIO_SITE": str(Path("build/docs").resolve())},
    )


ON_EACH_PYTHON = nox.parametrize("python", [nox.param(path, id=version) for version, path in PYTHONS.items()])


def is_first(session: nox.Session) -> bool:
    """Return whether the session uses the Python version that runs every test."""
    return session.python == next(iter(PYTHONS.values()))


@nox.session
@ON_EACH_PYTHON
def unit(session: nox.Session) -> None:
    """Test the built wheel without namespaces. Run version-independent tests only with the first Python."""
    if is_first(session):
        run_unit(session, "test")
    else:
        run_unit(session, "unit", *(f"--ignore=tests/{name}" for name in SAME_ON_EACH_PYTHON))


@nox.session(default=False)
@ON_EACH_PYTHON
def unit_full(session: nox.Session) -> None:
    """Run all tests that do not need namespaces on the built wheel, with every supported Python version found."""
    run_unit(session, "test")


def run_unit(session: nox.Session, group: str, *args: str) -> None:
    session.log("found " + ", ".join(f"{version} ({path})" for version, path in PYTHONS.items()))
    session.install(".", *nox.project.dependency_groups(PROJECT, group))
    # Copy the tests without the package, so that they import the wheel.
    away = Path(session.virtualenv.location).resolve() / "without-package"
    shutil.rmtree(away, ignore_errors=True)
    shutil.copytree(".", away, ignore=shutil.ignore_patterns("inco_trio", ".*", "__pycache__"))
    with session.chdir(away):
        words = ("tests", "-m", f"not ({NOT_UNIT} or faults or thorough)", *args)
        session.run(*COMPILE, *args, silent=True)
        # No line of the package depends on the Python version, so measure coverage on one version only.
        if is_first(session):
            run_pytest(session, *words, data="unit")
        else:
            session.run("pytest", *words, *FOUR_AT_A_TIME, *session.posargs)


@nox.session(default=False, python=next(iter(PYTHONS.values())))
def oldest(session: nox.Session) -> None:
    """Run the tests with the oldest allowed version of each dependency, on the oldest Python that was found."""
    need_programs(session)
    session.install(*nox.project.dependency_groups(PROJECT, "oldest"))
    # Without --upgrade, uv would keep a newer version that an earlier run installed.
    session.run(
        *("uv", "pip", "install", "--upgrade", "--resolution", "lowest-direct"),
        *("--editable", ".", "--requirements", "pyproject.toml", "--all-extras", "--group", "test"),
    )
    words = ("tests", "-m", "not qemu and not faults and not thorough")
    session.run(*AS_ROOT, "python", "-m", "pytest", *words, *FOUR_AT_A_TIME, *session.posargs, external=True)


@side_by_side
def wheel(session: nox.Session) -> None:
    """Build the sdist and the wheel, and test the wheel in an environment that contains nothing else."""
    session.install(*nox.project.dependency_groups(PROJECT, "wheel"))
    work = Path(session.virtualenv.location).resolve() / "work"
    shutil.rmtree(work, ignore_errors=True)
    session.run("python", "-m", "build", "--installer", "uv", "--outdir", str(work / "dist"))
    files = sorted(map(str, (work / "dist").iterdir()))
    session.run("twine", "check", "--strict", *files)
    python = str(work / "clean/bin/python")
    session.run("uv", "venv", "--quiet", str(work / "clean"))
    session.run("uv", "pip", "install", "--quiet", "--python", python, str(*(work / "dist").glob("*.whl")))
    session.run(
        *("pytest", "--confcutdir=tests/wheel", "tests/wheel/smoke.py", *FOUR_AT_A_TIME, *session.posargs),
        env={"INCO_TRIO_WHEEL_PYTHON": python, "INCO_TRIO_WHEEL_DIST": str(work / "dist")},
    )


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """Build a release with an SBOM in dist/, check that the build is reproducible, and audit the packages."""
    session.install(*nox.project.dependency_groups(PROJECT, "release"))
    work, dist = Path(session.virtualenv.location).resolve() / "work", Path("dist").resolve()
    for place in (work, dist):
        shutil.rmtree(place, ignore_errors=True)
    # Use the time of the commit for all timestamps in the files.
    session.env["SOURCE_DATE_EPOCH"] = str(session.run("git", "log", "-1", "--format=%ct", external=True, silent=True))
    for place in (dist, work / "again"):
        session.run("python", "-m", "build", "--installer", "uv", "--outdir", str(place))
    for file in sorted(dist.iterdir()):
        if file.read_bytes() != (work / "again" / file.name).read_bytes():
            session.error(f"{file.name}: the second build differs: the build is not reproducible")
    session.run("twine", "check", "--strict", *map(str, dist.iterdir()))
    # The audit and the SBOM cover what a user installs, without the tools of this session.
    (wheel,) = dist.glob("*.whl")
    python = str(work / "clean/bin/python")
    session.run("uv", "venv", "--quiet", str(work / "clean"))
    extras = ",".join(PROJECT["project"]["optional-dependencies"])
    session.run("uv", "pip", "install", "--quiet", "--python", python, f"{wheel}[{extras}]")
    installed = work / "requirements.txt"
    lines = session.run("uv", "pip", "freeze", "--python", python, "--exclude-editable", silent=True)
    # Omit uv's messages, and inco-trio itself, which uv lists with a path instead of a version.
    installed.write_text("".join(f"{line}\n" for line in str(lines).splitlines() if "==" in line))
    session.run(
        *("cyclonedx-py", "environment", "--output-reproducible", "--pyproject", "pyproject.toml"),
        *("--output-file", str(dist / f"{wheel.name.partition('-py3')[0]}.cdx.json"), python),
    )
    # Run the audit last: it needs the vulnerability database of PyPI, which a mirror might not have.
    audit = ("pip-audit", "--strict", "--no-deps", "--disable-pip", "--progress-spinner", "off")
    report = str(session.run(*audit, "--requirement", str(installed), silent=True, success_codes=(0, 1))).strip()
    session.log(report)
    if "No known vulnerabilities found" not in report:
        reason = report.splitlines()[-1].removeprefix("ERROR:pip_audit._cli:")
        if re.search("^Found [0-9]+ known ", report, re.MULTILINE):
            session.error("pip-audit: the dependencies have known vulnerabilities: require versions without them")
        session.error(
            f"pip-audit: the dependencies were not audited ({reason}): "
            "the files in dist/ are complete, but run this session with access to pypi.org before you publish them"
        )


@nox.session(python=list(PYTHONS.values())[-1], allow_parallel=True)
def examples(session: nox.Session) -> None:
    """Test each example project with the built wheel and the newest Python. Check that its tests detect faults.

    `netns` runs the tests of the pytest plugin with nox's own Python.
    """
    need_programs(session)
    session.install(*nox.project.dependency_groups(PROJECT, "examples"))
    work = Path(session.virtualenv.location).resolve() / "work"
    shutil.rmtree(work / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--installer", "uv", "--wheel", "--outdir", str(work / "dist"))
    (wheel,) = (work / "dist").iterdir()
    session.run(
        *("pytest", "--confcutdir=tests/examples", "tests/examples/check.py", *FOUR_AT_A_TIME, *session.posargs),
        env={"INCO_TRIO_WHEEL": str(wheel), "INCO_TRIO_ENVIRONMENTS": str(work / "environments")},
    )


@nox.session
def netns(session: nox.Session) -> None:
    """Run the tests that need network namespaces, s6, a second core in QEMU or other system tools."""
    need_programs(session)
    install(session, "test")
    session.run(*COMPILE, silent=True)
    run_pytest(session, "tests", "-m", f"({NOT_UNIT}) and not thorough", data="netns", root=True)


@nox.session(default=False)
def thorough(session: nox.Session) -> None:
    """Run the slow variants of tests: hundreds of boards, a million notifications, many restarts, the longest pages."""
    need_programs(session)
    install(session, "test")
    session.run(*AS_ROOT, "pytest", "tests", "-m", "thorough", *EIGHT_AT_A_TIME, *session.posargs, external=True)


@nox.session(default=False)
def mosquitto13(session: nox.Session) -> None:
    """Download and unpack Debian 13's mosquitto, and run the MQTT tests with it."""
    need_programs(session)
    install(session, "test")
    place = Path(session.virtualenv.location, "debian13")
    program = session.run("python", "-m", "tests.debian13", str(place), silent=True, stderr=None)
    tests = sorted(str(path) for path in Path("tests").glob("test_mqtt*.py"))
    run_pytest(session, *tests, data="mosquitto13", root=True, INCO_TRIO_MOSQUITTO=str(program).strip())


@nox.session
def faults_short(session: nox.Session) -> None:
    """Run the quick form of the fault suite."""
    run_faults(session, "tests/faults", INCO_TRIO_FAULTS="short")


@nox.session(default=False)
def faults(session: nox.Session) -> None:
    """Run the full fault suite, and 10,000 instead of 300 round trips over each kind of link to QEMU."""
    run_faults(session, "tests", "-m", "faults or qemu", INCO_TRIO_FAULTS="full", INCO_TRIO_ROUND_TRIPS="10000")


def run_faults(session: nox.Session, *tests: str, **env: str) -> None:
    need_programs(session)
    install(session, "test")
    run_pytest(session, *tests, data="faults", root=True, **env)


@nox.session(default=False)
def loaded(session: nox.Session) -> None:
    """Run the default tests in random order next to busy processes. `-- --randomly-seed=N` repeats an order."""
    need_programs(session)
    install(session, "test", "loaded")
    count = 2 * (os.cpu_count() or 1)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    session.log(f"started {count} busy processes with a higher priority than the tests")
    try:
        session.run(
            *(*AS_ROOT, "nice", "-n", "1", "pytest", "tests", "-m", "not thorough", *EIGHT_AT_A_TIME, *session.posargs),
            env={"INCO_TRIO_FAULTS": "short"},
            external=True,
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Inject random faults for a given time: `nox -s soak -- --minutes 30`."""
    need_programs(session)
    install(session, "test")
    session.run(*AS_ROOT, "python", "tests/soak.py", *session.posargs, external=True)


@nox.session(default=False)
def fleet(session: nox.Session) -> None:
    """Measure hundreds of boards, gateways and a broker: `nox -s fleet -- --boards 500 --seconds 60`."""
    need_programs(session)
    install(session, "test")
    session.run("python", "-m", "tests.fleet", *session.posargs)


@side_by_side
def fuzz_short(session: nox.Session) -> None:
    """Run each fuzz target for a few seconds."""
    run_fuzz(session, "--runs", "200")


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Fuzz all code that reads other programs' data, for 10 minutes by default: `nox -s fuzz -- --minutes 60`."""
    run_fuzz(session)


def run_fuzz(session: nox.Session, *args: str) -> None:
    install(session, "test", "fuzz")
    session.run("python", "-m", "tests.fuzz", *args, *session.posargs)


@side_by_side
def bench_smoke(session: nox.Session) -> None:
    """Run the quick form of the benchmark. Its figures are not meaningful."""
    need_programs(session)
    install(session, "test", "bench")
    session.run("pytest", "tests/bench/smoke.py", *FOUR_AT_A_TIME, *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Compare inco-trio with a minimal Trio loop, a C program and a script. `-- --beside PATH` includes a checkout."""
    need_programs(session)
    install(session, "test", "bench")
    session.run("python", "-m", "tests.bench", *session.posargs)


@nox.session(default=False)
def fresh(session: nox.Session) -> None:
    """Run the README's commands on bare Debian systems: `nox -s fresh -- bookworm` runs one suite."""
    need_programs(session, {"debootstrap": ("debootstrap",)})
    session.install("pip>=24")  # needed to read pip's configuration; uv creates environments without pip
    session.run("python", "-u", "-m", "tests.fresh", *session.posargs)


@nox.session(default=False)
def kernels(session: nox.Session) -> None:
    """Run tests/kernels on Debian's kernels in QEMU: `nox -s kernels -- 6.1` runs one kernel."""
    need_programs(session, MACHINE_PACKAGES)
    session.install("attrs>=24.1", *nox.project.dependency_groups(PROJECT, "oldest"))
    session.run("python", "-u", "-m", "tests.kernels", *session.posargs)


@nox.session(default=False)
def processors(session: nox.Session) -> None:
    """Run the tests that read and write kernel data on emulated processors: `nox -s processors -- s390x` runs one."""
    need_programs(session, MACHINE_PACKAGES)
    session.install("attrs>=24.1", *nox.project.dependency_groups(PROJECT, "oldest"))
    session.run("python", "-u", "-m", "tests.processors", *session.posargs)


@nox.session(default=False)
def deb(session: nox.Session) -> None:
    """Build the Debian package for each suite, and check it in a booted system (as root): `nox -s deb -- bookworm`."""
    need_programs(session, CONTAINER_PACKAGES)
    session.install(*nox.project.dependency_groups(PROJECT, "packages"))
    session.run("python", "-u", "-m", "packages.deb", *session.posargs)


@nox.session(default=False)
def bundle(session: nox.Session) -> None:
    """Build the offline bundle in dist/, with the wheels of all dependencies, and install it without a network."""
    session.install(*nox.project.dependency_groups(PROJECT, "packages"))
    session.run("python", "-m", "packages.bundle")


@nox.session(default=False)
def yocto(session: nox.Session) -> None:
    """Check the Yocto recipes with oelint-adv."""
    session.install(*nox.project.dependency_groups(PROJECT, "yocto"))
    recipes = sorted(map(str, Path("packages/yocto").glob("*.bb")))
    # Skip the rule that needs a network.
    suppressed = ("--suppress", "oelint.vars.homepageping")
    session.run("oelint-adv", "--quiet", "--mode", "all", "--release", "scarthgap", *suppressed, *recipes)


@nox.session(default=False)
def lock(session: nox.Session) -> None:
    """Write the dependencies' newest versions to packages/requirements.txt, for the bundle and the Debian package."""
    session.install(*nox.project.dependency_groups(PROJECT, "packages"))
    session.run(
        *("uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--upgrade"),
        *("--no-annotate", "--custom-compile-command", "nox -s lock", "--generate-hashes"),
        *("--extra", "mqtt", "--extra", "rich", "pyproject.toml", "packages/requirements.in"),
        *("--output-file", "packages/requirements.txt"),
    )


@nox.session(default=False)
def generated(session: nox.Session) -> None:
    """Regenerate the man pages and shell completions from the argument parser, and the packages' systemd unit."""
    install(session, "manual")
    session.run("python", "-m", "docs.manual")
    session.run("python", "-m", "packages.unit")


@nox.session
def coverage(session: nox.Session) -> None:
    """Combine the coverage data of all test sessions. Fail if the coverage is below the limit in pyproject.toml."""
    session.install(*nox.project.dependency_groups(PROJECT, "test"))
    session.env["COVERAGE_FILE"] = str(COVERAGE_DATA / "data")
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")
