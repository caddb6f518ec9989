SUMMARY = "Run asyncio code in Trio programs"
DESCRIPTION = "trio-asyncio is an event loop for asyncio programs that runs on Trio"
HOMEPAGE = "https://github.com/python-trio/trio-asyncio"
BUGTRACKER = "https://github.com/python-trio/trio-asyncio/issues"
SECTION = "devel/python"
CVE_PRODUCT = "trio-asyncio"
LICENSE = "MIT | Apache-2.0"
LIC_FILES_CHKSUM = "\
    file://LICENSE.APACHE2;md5=3b83ef96387f14655fc854ddc3c6bd57 \
    file://LICENSE.MIT;md5=e62ba5042d5983462ad229f5aec1576c \
"

SRC_URI[sha256sum] = "9f4e80aa344555548bf440e0f43072743aac1b3a538ebe3994f52363b7752d6f"

PYPI_PACKAGE = "trio_asyncio"

inherit pypi setuptools3

RDEPENDS:${PN} += "\
    python3-asyncio \
    python3-core \
    python3-greenlet \
    python3-outcome \
    python3-sniffio \
    python3-trio \
"

BBCLASSEXTEND = "native nativesdk"
