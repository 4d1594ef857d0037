import stat

import pytest

from penstock.core.errors import StartupFailed
from penstock.transport.key import VARIABLE, cluster_key


def test_a_key_is_made_once_for_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    first, second = cluster_key(), cluster_key()

    (file,) = (tmp_path / "penstock").iterdir()
    assert first == second
    assert len(first) == 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_two_keys_differ(tmp_path):
    assert cluster_key(tmp_path / "a") != cluster_key(tmp_path / "b")


def test_the_environment_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "a key that everybody was given")

    assert cluster_key() == cluster_key()
    assert not list(tmp_path.iterdir())


def test_a_key_that_others_can_read_is_refused(tmp_path):
    file = tmp_path / "key"
    cluster_key(file)
    file.chmod(0o640)

    with pytest.raises(StartupFailed, match="chmod 600"):
        cluster_key(file)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40])
def test_what_is_no_key_is_refused(tmp_path, content):
    file = tmp_path / "key"
    file.write_bytes(content)
    file.chmod(0o600)

    with pytest.raises(StartupFailed, match="cluster key"):
        cluster_key(file)


def test_a_short_key_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "123")

    with pytest.raises(StartupFailed, match=VARIABLE):
        cluster_key()
