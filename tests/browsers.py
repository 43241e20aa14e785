"""Headless Chromium for tests: without it they are skipped on a desk, and fail in CI, which installs it."""

import os
from pathlib import Path

import pytest

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")

needs_chromium = pytest.mark.skipif(
    not CHROMIUM.exists() and not os.environ.get("CI"),
    reason=f"{CHROMIUM} is missing: apt-get install chromium chromium-driver",
)
