"""Fixtures shared by the test files; `tiny` builds what they hold."""

import copy
import os
import signal
from pathlib import Path

import pytest
import torch

import tiny
from flextron.elastic.families import FAMILIES
from flextron.model import ElasticModel

LONGEST = (
    "training/test_run.py",
    "test_real.py",
    "demo/test_quickstart.py",
    "test_readme.py",
    "training/test_sharding.py",
    "training/test_snapshot.py",
    "routers/test_static_router.py",
    "test_cli.py",
)
# `pytest -n 2`: two processes of one thread each, and so are the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ALL_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else torch.get_num_threads()
# Tiny models, of fixtures too, are many times faster in one thread than where threads wait for each other.
torch.set_num_threads(1)
# A shell starts what runs in the background without Ctrl-C, and so would the commands be that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """What takes longest begins first, so that no process of `pytest -n 2` is left with it at the end."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.fixture(autouse=True)
def thread_count(request):
    """Real models use all threads, unless several processes run side by side."""
    torch.set_num_threads(1 if request.node.get_closest_marker("real") is None else ALL_THREADS)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def token_cache(tmp_path_factory):
    """Tokenised text of the tests stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXTRON_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def plain_llama():
    """A plain model to read or copy, never to change."""
    return tiny.plain_model("llama")


@pytest.fixture
def llama(plain_llama) -> ElasticModel:
    """A fresh elastic copy of `plain_llama`."""
    return ElasticModel(copy.deepcopy(plain_llama))


@pytest.fixture
def sensitivity(llama):
    return tiny.uneven_sensitivity(llama)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a tiny llama with a tokenizer, not ranked; to read, never to change."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    ElasticModel(tiny.plain_model("llama", vocab_size=300), tiny.tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def plain(request):
    """A plain model of each family in turn, never changed."""
    return tiny.plain_model(request.param)


@pytest.fixture
def model(plain) -> ElasticModel:
    """A fresh elastic copy of `plain`."""
    return ElasticModel(copy.deepcopy(plain))


@pytest.fixture
def tokens() -> torch.Tensor:
    return tiny.token_ids()
