"""The private directory: nobody else's business, and never left for long."""

import os
import stat
from pathlib import Path

from penstock.runtime.folder import RunFolder, sweep


def test_only_its_owner_can_look_inside(tmp_path: Path):
    folder = RunFolder.create(tmp_path)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert folder.path.parent == tmp_path
    folder.remove()
    assert list(tmp_path.iterdir()) == []
    folder.remove()


def test_an_abandoned_one_is_removed_by_the_next(tmp_path: Path):
    abandoned = RunFolder.create(tmp_path)
    (abandoned.path / "x.sock").touch()
    os.close(abandoned._lock_fd)
    used = RunFolder.create(tmp_path)
    stranger = tmp_path / "penstock-without-lock"
    stranger.mkdir()
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([used.path, stranger])
    used.remove()


def test_a_link_is_not_followed(tmp_path: Path):
    target = tmp_path / "precious"
    target.mkdir()
    (target / "lock").touch()
    (tmp_path / "penstock-link").symlink_to(target)
    sweep(tmp_path)
    assert (target / "lock").exists()
