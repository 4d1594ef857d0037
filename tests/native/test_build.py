import ctypes
import os
import subprocess
import sys

import pytest

from penstock.core.errors import BackendUnavailable
from penstock.native.build import Recipe, build, find_compiler

ANSWER = 'extern "C" int answer() {{ return {}; }}'


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    try:
        find_compiler()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(ANSWER.format(42))
    return Recipe("answer", "the answer", folder)


def answer_of(path):
    return ctypes.CDLL(str(path)).answer()


def test_compiles_once_and_finds_it_again(recipe):
    said = []

    first = build(recipe, said.append)
    second = build(recipe, said.append)

    assert first == second
    assert first.name.startswith("answer-")
    assert [line.split()[0] for line in said] == ["compiling", "compiled"]
    assert answer_of(first) == 42


def test_another_source_is_another_library(recipe):
    old = build(recipe)

    (recipe.folder / "answer.cpp").write_text(ANSWER.format(43))

    assert answer_of(build(recipe)) == 43
    assert answer_of(old) == 42


def test_a_source_that_does_not_compile_is_refused_with_what_the_compiler_said(recipe):
    (recipe.folder / "answer.cpp").write_text("this is no C++;")

    with pytest.raises(BackendUnavailable, match=r"could not compile the answer[\s\S]*error"):
        build(recipe)

    assert not list(recipe.folder.parent.glob("cache/**/*.so"))


def test_without_a_compiler_it_says_what_to_install(recipe, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(BackendUnavailable, match=r"no-such-compiler.*install a C\+\+17 compiler"):
        build(recipe)


@pytest.mark.skipif(os.getuid() == 0, reason="root can write anywhere")
def test_a_cache_that_cannot_be_written_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")

    with pytest.raises(BackendUnavailable, match="set XDG_CACHE_HOME"):
        build(recipe)


def test_a_cache_that_others_can_write_is_not_trusted(recipe):
    library = build(recipe)
    library.parent.chmod(0o777)

    with pytest.raises(BackendUnavailable, match="can be written by others"):
        build(recipe)


def test_processes_that_start_together_compile_once(recipe):
    program = (
        "import sys; from pathlib import Path; from penstock.native.build import Recipe, build\n"
        f"build(Recipe('answer', 'the answer', Path({str(recipe.folder)!r})), print)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]

    said = "".join(process.communicate(timeout=60)[0] for process in processes)

    assert [process.returncode for process in processes] == [0, 0, 0]
    assert said.count("compiling") == 1
