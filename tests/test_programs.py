"""Compiled programs are kept for the next process, and freed memory for the next step."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from zephyr_jax import chips

OPTIONS = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")


def asked_and_had(cache_events):
    return cache_events["compile_requests_use_cache"], cache_events["cache_hits"]


@pytest.fixture
def user_cache(tmp_path, monkeypatch):
    """The user's cache folder of programs, where JAX is told of no other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    chips.keep_programs.cache_clear()
    yield tmp_path / "zephyr_jax" / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    chips.keep_programs.cache_clear()
    reset_cache()


def curve(x):
    return jax.nn.softmax(jnp.tanh(x @ x) + x)


def test_programs_are_kept_in_the_users_cache_bit_for_bit(
    user_cache, cache_events, monkeypatch, caplog
):
    caplog.set_level("INFO", logger="absl")
    x = jax.random.normal(jax.random.key(0), (40, 40))
    reset_cache()
    jax.jit(lambda x: x + 1)(x)  # compiled before, as in a notebook, and not kept
    chips.keep_programs()
    assert f"compiled programs are kept in {user_cache} (" in caplog.text
    cache_events.clear()
    first = jax.jit(curve)(x)
    (program,) = user_cache.glob("jit_curve-*-cache")
    assert asked_and_had(cache_events) == (1, 0)
    jax.clear_caches()
    np.testing.assert_array_equal(jax.jit(curve)(x), first)
    assert asked_and_had(cache_events) == (2, 1)

    # A process was killed while it wrote another one; the least recently used ones go.
    (user_cache / "jit_torn-0-cache").write_bytes(b"half")
    for number in range(3):
        for kind in ("cache", "atime"):
            path = user_cache / f"jit_old-{number}-{kind}"
            path.write_bytes(bytes(8))
            os.utime(path, (number, number))
    monkeypatch.setattr(chips, "_KEPT_PROGRAMS", 2)
    jax.config.update("jax_compilation_cache_dir", None)
    chips.keep_programs.cache_clear()
    chips.keep_programs()
    assert {path.name for path in user_cache.glob("*-cache")} == {program.name, "jit_old-2-cache"}
    assert jax.config.jax_compilation_cache_max_size == 5 << 30


def test_a_damaged_program_is_compiled_again(user_cache, caplog):
    """As JAX keeps them where zstandard is installed, a flipped bit may give other numbers."""
    chips.keep_programs()
    jax.clear_caches()
    x = jax.random.normal(jax.random.key(0), (40, 40))
    first = jax.jit(curve)(x)
    (path,) = user_cache.glob("jit_curve-*-cache")
    chips._check_programs(user_cache)  # as at the end of the process
    program = bytearray(path.read_bytes())
    program[100] ^= 4
    path.write_bytes(program)
    chips._check_programs(user_cache)
    assert f"{path} is damaged, so the program is compiled again" in caplog.text
    assert not list(user_cache.glob("jit_curve-*"))
    caplog.clear()
    jax.clear_caches()
    np.testing.assert_array_equal(jax.jit(curve)(x), first)
    chips._check_programs(user_cache)
    assert path.is_file()
    assert not caplog.text


def test_jaxs_own_settings_come_first(user_cache, tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    jax.config.update("jax_enable_compilation_cache", False)
    chips.keep_programs()
    jax.config.update("jax_enable_compilation_cache", True)
    assert jax.config.jax_compilation_cache_dir is None
    assert not caplog.text
    chips.keep_programs.cache_clear()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    chips.keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert f"compiled programs are kept in {tmp_path / 'own'} (" in caplog.text


def test_without_a_folder_to_write_to_programs_are_not_kept(user_cache, caplog):
    user_cache.parent.write_text("a file")
    chips.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
    (record,) = caplog.records
    assert record.getMessage().startswith("compiled programs are not kept: ")
    assert str(user_cache.parent) in record.getMessage()


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept():
    program = """
import resource
from zephyr_jax import chips
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        b"x" * (40 << 20)  # above every threshold
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
chips.keep_freed_memory()
faults()
print(first, faults())
"""
    words = [sys.executable, "-c", program]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    mapped, kept = map(int, done.stdout.split())
    assert mapped > 3 * 10_000  # pages of 4 KiB
    assert kept < 100
