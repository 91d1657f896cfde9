"""Programs that tests drive and that pip cannot install."""

import os
import shutil

import pytest

_PACKAGES = {
    "chromium": "chromium and fonts-noto-cjk",
    "prometheus": "prometheus",
    "promtool": "prometheus",
}


def needs(program: str) -> str:
    """Return the path of `program`, or skip the test and say what to install.

    Where LECTERN_TEST_NO_SKIP is set, as in CI, a missing program fails the test.
    """
    path = shutil.which(program)
    if path:
        return path
    message = f"{program} is not installed: install the package {_PACKAGES[program]}."
    if os.environ.get("LECTERN_TEST_NO_SKIP"):
        pytest.fail(message)
    pytest.skip(message)
