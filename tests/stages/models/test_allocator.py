"""Freed memory stays in a process that computes on a CPU, unless the environment sets the allocator."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.models import save_tiny_model
from tsdkd.stages.models.allocator import USER_SETTINGS, keep_freed_memory

BUFFERS, ELEMENTS = 10, 16_000_000
FAULTS = f"""
import resource, sys
import torch
from tsdkd.stages.models.load import load_model

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({BUFFERS}):
        torch.ones({ELEMENTS})
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
load_model(sys.argv[1])
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_after_a_model_is_loaded_buffers_are_not_faulted_in_again(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", seed=0)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(USER_SETTINGS)}
    child = subprocess.run(
        [sys.executable, "-c", FAULTS, str(tmp_path / "model")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, child.stdout.split())
    assert after < before / 20, child.stdout


@pytest.mark.parametrize(("name", "value"), [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.check=3")])
def test_the_users_settings_win(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("the allocator was changed"))
    assert not keep_freed_memory()


def test_another_c_library_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(USER_SETTINGS):
            monkeypatch.delenv(name)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("the allocator was changed"))
    assert not keep_freed_memory()
