"""The server that the tests of its API share: a tiny model, one engine, one port."""

import pytest
from served import engine_of, make_model, options_for, serving


@pytest.fixture(scope="session")
def served_model():
    return make_model()


@pytest.fixture(scope="session")
def shared_engine(served_model):
    with engine_of(served_model) as engine:
        yield engine


@pytest.fixture(scope="session")
def server(shared_engine, served_model):
    with serving(shared_engine, options_for(served_model)) as served:
        yield served


@pytest.fixture(scope="session")
def client(server):
    with server.client() as client:
        yield client
