# Checked with oelint-adv. Not built with BitBake and not tested on hardware.
SUMMARY = "Proxy for inter-core interrupts of AMP boards"
DESCRIPTION = "Carries inter-core interrupts between the cores of an asymmetric multiprocessing board"
HOMEPAGE = "https://github.com/inco-trio/inco-trio"
BUGTRACKER = "https://github.com/inco-trio/inco-trio/issues"
SECTION = "devel/python"
CVE_PRODUCT = "inco-trio"
LICENSE = "MIT"
LIC_FILES_CHKSUM = "file://LICENSE;md5=cb83b5a1715b5200bc04bdb8f970eecd"

DEPENDS += "python3-hatch-vcs-native"

# `nox -s release` builds the archive. inco-trio@.service is in packages/ of the source.
SRC_URI = "\
    file://inco_trio-${PV}.tar.gz \
    file://inco-trio@.service \
"
S = "${WORKDIR}/inco_trio-${PV}"

inherit python_hatchling systemd useradd

SYSTEMD_SERVICE:${PN} = "inco-trio@.service"
# Enable the unit of each link, for example inco-trio@rpmsg4000.
SYSTEMD_AUTO_ENABLE = "disable"

USERADD_PACKAGES = "${PN}"
USERADD_PARAM:${PN} = "--system --user-group --no-create-home --shell /sbin/nologin inco-trio"

do_install:append() {
    install -d ${D}${systemd_system_unitdir}
    install -m 0644 ${WORKDIR}/inco-trio@.service ${D}${systemd_system_unitdir}
    install -d ${D}${sysconfdir}/inco-trio
}

FILES:${PN} += "\
    ${datadir}/bash-completion \
    ${datadir}/fish \
    ${datadir}/zsh \
    ${systemd_system_unitdir}/inco-trio@.service \
"

RDEPENDS:${PN} += "\
    python3-asyncio \
    python3-attrs \
    python3-cattrs \
    python3-core \
    python3-ctypes \
    python3-fcntl \
    python3-json \
    python3-logging \
    python3-math \
    python3-mmap \
    python3-netclient \
    python3-pyasyncore \
    python3-pyinotify \
    python3-shell \
    python3-trio \
    python3-trio-asyncio \
"

BBCLASSEXTEND = "native nativesdk"
