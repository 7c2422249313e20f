"""Damaged files of every kind: a reader works, with finite numbers, or says in one line what is wrong (damage.py)."""

import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import damage
from flextron import ElasticModel
from flextron.elastic.checkpoint import quiet_transformers

SECONDS = 60
"""Within which a damaged file must be read or refused, on a busy machine too."""
MEMORY_BYTES = 3 << 30
"""That reading a damaged file may take, beyond what the process has."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    quiet_transformers()
    return damage.make_folder(tmp_path_factory.mktemp("fuzz") / "root")


@pytest.fixture(scope="module")
def model(folder):
    return ElasticModel.from_pretrained(folder / "elastic", dtype="float32")


@contextmanager
def bounded():
    """Stop after SECONDS, and refuse more memory than MEMORY_BYTES."""

    def stop(*_):
        raise TimeoutError(f"no answer after {SECONDS} s")

    before, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    now_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now_bytes + MEMORY_BYTES, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


places, kinds, seeds = st.integers(0, 999), st.sampled_from(sorted(damage.DAMAGES)), st.integers(0, 2**32 - 1)
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def check(folder, model, place, how, seed):
    names = damage.names(folder)
    with bounded():
        damage.check(folder, model, names[place % len(names)], how, seed)


@settings(max_examples=40, derandomize=True, **QUIET)
@given(places, kinds, seeds)
def test_a_damaged_file_is_read_or_refused_in_one_line(folder, model, place, how, seed):
    check(folder, model, place, how, seed)


@pytest.mark.slow
@settings(max_examples=1000, **QUIET)
@given(places, kinds, seeds)
def test_thousands_of_damaged_files(folder, model, place, how, seed):
    check(folder, model, place, how, seed)


def test_what_is_not_damaged_is_read(folder, model):
    """Else the tests above would test nothing."""
    for read in {read for name in damage.names(folder) for read in damage.readers(name)}:
        read(folder, model)
