from __future__ import annotations

import pytest

from tests import require


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without nvcc."""
    monkeypatch.setitem(require.NEEDS, "nvcc", (lambda: None, "no nvcc"))
    monkeypatch.delenv(require.VARIABLE, raising=False)


@pytest.mark.usefixtures("lacking")
def test_what_is_missing_skips() -> None:
    with pytest.raises(pytest.skip.Exception, match="no nvcc"):
        require.need("nvcc")


@pytest.mark.usefixtures("lacking")
@pytest.mark.parametrize("named", ["compiler,nvcc", "all"])
def test_what_is_missing_and_required_fails(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(require.VARIABLE, named)
    with pytest.raises(pytest.fail.Exception, match="no nvcc; KVCOMPRESS_REQUIRE names nvcc"):
        require.need("nvcc")


def test_a_name_that_nothing_needs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(require.VARIABLE, "compiler,nvc")
    with pytest.raises(ValueError, match="found KVCOMPRESS_REQUIRE with nvc; expected all or some of compiler"):
        require.required()
