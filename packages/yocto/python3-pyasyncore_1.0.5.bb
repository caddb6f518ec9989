SUMMARY = "The module asyncore, which Python 3.12 removed"
DESCRIPTION = "Makes asyncore available for Python 3.12 and newer"
HOMEPAGE = "https://github.com/simonrob/pyasyncore"
BUGTRACKER = "https://github.com/simonrob/pyasyncore/issues"
SECTION = "devel/python"
CVE_PRODUCT = "pyasyncore"
LICENSE = "PSF-2.0"
LIC_FILES_CHKSUM = "file://LICENSE;md5=d5605fc335ce1bab614032468d0a1e00"

SRC_URI[sha256sum] = "dd483d5103a6d59b66b86e0ca2334ad43dca732ff23a0ac5d63c88c52510542e"

inherit pypi setuptools3

RDEPENDS:${PN} += "python3-core"

BBCLASSEXTEND = "native nativesdk"
