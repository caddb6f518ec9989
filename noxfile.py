"""The project's checks: plain `nox` runs them all, `nox -l` lists them, `nox -s NAME -- ARGS` runs one of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
# uv makes an environment from its cache in a second; without uv, virtualenv and pip take half a minute for each.
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True

PROJECT = nox.project.load_toml("pyproject.toml")
COVERAGE_DATA = Path(".nox/coverage-data").resolve()

DEBIAN_PACKAGES = {
    "cc": ("gcc", "libc6-dev"),
    "chromedriver": ("chromium-driver",),
    "chromium": ("chromium",),
    "execlineb": ("execline",),
    "fish": ("fish",),
    "ip": ("iproute2",),
    "man": ("man-db",),
    "make": ("make",),
    "mandoc": ("mandoc",),
    "mosquitto": ("mosquitto",),
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

# Two tests run at a time, each with its own namespaces, directories and sockets. Each session prints its slowest tests.
TWO_AT_A_TIME = ("-p", "xdist", "-n", "2", "--dist", "loadgroup", "--durations", "10")

# Debian keeps ip, tcpdump and mosquitto where a user's PATH does not look.
os.environ["PATH"] += os.pathsep + os.pathsep.join(("/usr/sbin", "/sbin"))

# Namespaces and mounts need CAP_SYS_ADMIN; in a user namespace of its own, everyone has it.
AS_ROOT = () if os.geteuid() == 0 else ("unshare", "--user", "--mount", "--map-current-user", "--keep-caps")


def find_pythons() -> dict[str, str]:
    """Map each supported minor version to one interpreter that runs, of PATH or of pyenv.

    Being found is not enough: pyenv puts a `python3.12` on PATH that fails unless its version is enabled.
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
    """The path of the interpreter `candidate`, if it runs, is that version and has what pip and coverage need."""
    code = "import sqlite3, ssl, sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    try:
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    found, path = done.stdout.strip().split(" ", 1)
    return path if found == version else None


# With none of them, the tests run on what nox runs on: a gate without a session would be open.
PYTHONS = find_pythons() or {"other": sys.executable}


def install(session: nox.Session, *groups: str) -> None:
    """Install the project, editable, and groups of pyproject.toml."""
    session.install("-e", ".", *nox.project.dependency_groups(PROJECT, *groups))


def missing_programs() -> tuple[list[str], list[str]]:
    """The programs that are not there, and the Debian packages that have them."""
    missing = [program for program in DEBIAN_PACKAGES if not shutil.which(program)]
    return missing, [package for program in missing for package in DEBIAN_PACKAGES[program]]


def need_programs(session: nox.Session) -> None:
    """Have the programs that the kernel's tests use, from Debian's packages where that is possible."""
    missing, packages = missing_programs()
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        session.log(f"{', '.join(missing)} missing: installing {' '.join(packages)}")
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            # Whether it worked is seen by what is there afterwards: an update may fail for a source that is not needed.
            session.run_install(
                "apt-get", *command, env={"DEBIAN_FRONTEND": "noninteractive"}, external=True, success_codes=range(256)
            )
        missing, packages = missing_programs()
    if missing:
        session.error(f"{', '.join(missing)} missing: install {' '.join(packages)} (the names of Debian's packages)")


def run_pytest(session: nox.Session, *args: str, data: str, root: bool = False, **env: str) -> None:
    """Run pytest and its subprocesses under coverage, its data kept as `data` until the session `coverage`."""
    COVERAGE_DATA.mkdir(parents=True, exist_ok=True)
    for old in COVERAGE_DATA.glob(f"data.{data}.*"):
        old.unlink()
    session.run(
        *(AS_ROOT if root else ()),
        *("coverage", "run", "-m", "pytest", *args, *TWO_AT_A_TIME, *session.posargs),
        env={"COVERAGE_FILE": str(COVERAGE_DATA / f"data.{data}"), **env},
        external=root,
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's rules and format; the published schemas and zizmor's rules for the workflows."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    roots = [Path(), *sorted(Path("examples").iterdir())]
    github = [str(path) for root in roots for path in sorted(root.glob(".github/workflows/*.yml"))]
    gitlab = [str(path) for root in roots for path in root.glob(".gitlab-ci.yml")]
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *github)
    gitlab_schema = ("vendor.gitlab-ci", "--data-transform", "gitlab-ci")
    session.run("check-jsonschema", "--builtin-schema", *gitlab_schema, *gitlab)
    session.run("zizmor", "--offline", "--pedantic", "--strict-collection", "--no-progress", *github)


@nox.session
def types(session: nox.Session) -> None:
    """Strict types: package, tests, netns, docs and this file."""
    install(session, "types")
    session.run("mypy", "--strict")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, in build/docs; a warning is an error."""
    install(session, "docs")
    session.run("sphinx-build", "-q", "-W", "--keep-going", "-b", "html", "docs", "build/docs", *session.posargs)


@nox.session
@nox.parametrize("python", [nox.param(path, id=version) for version, path in PYTHONS.items()])
def unit(session: nox.Session) -> None:
    """Tests without namespaces, of the built wheel, on each supported Python that was found."""
    session.log("found " + ", ".join(f"{version} ({path})" for version, path in PYTHONS.items()))
    session.install(".", *nox.project.dependency_groups(PROJECT, "test"))
    # Where there is no package beside the tests, what they import is the wheel's.
    away = Path(session.virtualenv.location).resolve() / "without-package"
    shutil.rmtree(away, ignore_errors=True)
    shutil.copytree(".", away, ignore=shutil.ignore_patterns("inco_trio", ".*", "__pycache__"))
    with session.chdir(away):
        words = ("tests", "-m", "not netns and not s6 and not qemu and not faults and not tools")
        # No line is for one Python only, so that one is measured.
        if session.python == next(iter(PYTHONS.values())):
            run_pytest(session, *words, data=session.name)
        else:
            session.run("pytest", *words, *TWO_AT_A_TIME, *session.posargs)


@nox.session(default=False, python=next(iter(PYTHONS.values())))
def oldest(session: nox.Session) -> None:
    """Tests with the oldest allowed version of each dependency, on the oldest Python that was found."""
    need_programs(session)
    session.install(*nox.project.dependency_groups(PROJECT, "oldest"))
    # Without --upgrade, uv keeps a newer version that an earlier run installed.
    session.run(
        *("uv", "pip", "install", "--upgrade", "--resolution", "lowest-direct"),
        *("--editable", ".", "--requirements", "pyproject.toml", "--all-extras", "--group", "test"),
    )
    words = ("tests", "-m", "not qemu and not faults")
    session.run(*AS_ROOT, "python", "-m", "pytest", *words, *TWO_AT_A_TIME, *session.posargs, external=True)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build sdist and wheel, install the wheel into an environment with nothing else, and try it there."""
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
        *("pytest", "--confcutdir=tests/wheel", "tests/wheel/smoke.py", *TWO_AT_A_TIME, *session.posargs),
        env={"INCO_TRIO_WHEEL_PYTHON": python, "INCO_TRIO_WHEEL_DIST": str(work / "dist")},
    )


@nox.session
@nox.parametrize("python", [nox.param(path, id=version) for version, path in PYTHONS.items()])
def examples(session: nox.Session) -> None:
    """The example projects, from the built wheel, each in an environment of its own; on one Python also faulty."""
    need_programs(session)
    session.install(*nox.project.dependency_groups(PROJECT, "examples"))
    work = Path(session.virtualenv.location).resolve() / "work"
    shutil.rmtree(work / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--installer", "uv", "--wheel", "--outdir", str(work / "dist"))
    (wheel,) = (work / "dist").iterdir()
    # A fault is found on one Python as on the others.
    which = () if session.python == next(iter(PYTHONS.values())) else ("-k", "passes")
    session.run(
        # Four at a time, as a faulty example does nothing but wait for its deadline.
        *("pytest", "--confcutdir=tests/examples", "tests/examples/check.py", *which, *TWO_AT_A_TIME, "-n", "4"),
        *session.posargs,
        env={"INCO_TRIO_WHEEL": str(wheel), "INCO_TRIO_ENVIRONMENTS": str(work / "environments")},
    )


@nox.session
def netns(session: nox.Session) -> None:
    """The real program on the real kernel, in network namespaces, under a real s6, and a second core in QEMU."""
    need_programs(session)
    install(session, "test")
    run_pytest(session, "tests", "-m", "netns or s6 or qemu or tools", data="netns", root=True)


@nox.session
def faults_short(session: nox.Session) -> None:
    """The fault suite, its quick form."""
    run_faults(session, "short")


@nox.session(default=False)
def faults(session: nox.Session) -> None:
    """The fault suite, all of it: minutes."""
    run_faults(session, "full")


def run_faults(session: nox.Session, form: str) -> None:
    need_programs(session)
    install(session, "test")
    run_pytest(session, "tests", "-m", "faults", data="faults", root=True, INCO_TRIO_FAULTS=form)


@nox.session(default=False)
def loaded(session: nox.Session) -> None:
    """All tests in random order next to busy processes; `-- --randomly-seed=N` repeats an order."""
    need_programs(session)
    install(session, "test", "loaded")
    count = 2 * (os.cpu_count() or 1)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    session.log(f"{count} busy processes, with a higher priority than the tests")
    try:
        session.run(
            *(*AS_ROOT, "nice", "-n", "1", "pytest", "tests", *TWO_AT_A_TIME, *session.posargs),
            env={"INCO_TRIO_FAULTS": "short"},
            external=True,
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Faults at random for as long as wanted: `nox -s soak -- --minutes 30`."""
    need_programs(session)
    install(session, "test")
    session.run(*AS_ROOT, "python", "tests/soak.py", *session.posargs, external=True)


@nox.session(default=False)
def fleet(session: nox.Session) -> None:
    """Boards by the hundred, gateways and a broker on this machine: `nox -s fleet -- --boards 500 --seconds 60`."""
    need_programs(session)
    install(session, "test")
    session.run("python", "-m", "tests.fleet", *session.posargs)


@nox.session
def bench_smoke(session: nox.Session) -> None:
    """The benchmark's quick form, which shows that it works and no figures."""
    run_bench(session, "--smoke", "--out", f"{session.virtualenv.location}/results")


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """The benchmark against a floor, C and the usual script, with plots; `-- --beside PATH` adds another checkout."""
    run_bench(session)


def run_bench(session: nox.Session, *args: str) -> None:
    need_programs(session)
    install(session, "test", "bench")
    session.run("python", "-m", "tests.bench", *args, *session.posargs)


@nox.session(default=False)
def fresh(session: nox.Session) -> None:
    """The README's commands on bare Debian systems, as root and as a user: `nox -s fresh -- bookworm` runs one."""
    session.run("python", "-u", "-m", "tests.fresh", *session.posargs)


@nox.session(default=False)
def generated(session: nox.Session) -> None:
    """Write the man pages and the completions of shells again, from the parser of `--help`."""
    install(session, "manual")
    session.run("python", "-m", "docs.manual")


@nox.session
def coverage(session: nox.Session) -> None:
    """Join what the tests above measured, and fail below the figure in pyproject.toml."""
    session.install(*nox.project.dependency_groups(PROJECT, "test"))
    session.env["COVERAGE_FILE"] = str(COVERAGE_DATA / "data")
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")
