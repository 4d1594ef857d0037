"""Tests of both ends of TCP run with what is compiled, and again without a compiler."""

import pytest

from penstock.transport.native.library import load_library


@pytest.fixture(params=["native", "python"])
def implementation(request, monkeypatch):
    """Run a test with the compiled transport, and again without a compiler."""
    if request.param == "python":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif load_library() is None:
        pytest.skip("there is no compiler")
    load_library.cache_clear()
    yield request.param
    load_library.cache_clear()
