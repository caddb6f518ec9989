"""Tests of how tests/fresh.py finds pip settings and the mirror; the nox session `fresh` tests the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fresh import as_environment, find_mirror, local_files


def test_settings_of_pip_become_environment_variables_for_pip_and_uv(tmp_path: Path) -> None:
    certificate = tmp_path / "ca.crt"
    certificate.touch()
    listed = f"""
:env:.retries='7'
download.timeout='1'
global.cert='{certificate}'
global.extra-index-url='file://{tmp_path} https://example.org/simple'
global.find-links='{tmp_path}'
global.retries='5'
global.timeout='5'
install.timeout='6'
""".lstrip()
    settings = as_environment(listed)
    assert settings == {
        "PIP_CERT": str(certificate),
        "PIP_EXTRA_INDEX_URL": "https://example.org/simple",
        "PIP_RETRIES": "7",
        "PIP_TIMEOUT": "6",
        "SSL_CERT_FILE": str(certificate),
        "UV_INDEX": "https://example.org/simple",
    }
    assert local_files(settings) == [certificate]


def test_the_environment_variable_selects_the_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INCO_TRIO_DEBIAN_MIRROR", "http://mirror.example.org/debian")
    assert find_mirror() == "http://mirror.example.org/debian"
