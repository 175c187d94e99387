import pytest

from tests.helpers.shards import select_rows, write_forms


@pytest.fixture(scope="session")
def rows(demo_rows):
    """A hundred demo pairs."""
    return select_rows(demo_rows, 100)


@pytest.fixture(scope="session")
def forms(rows, tmp_path_factory):
    """The pairs in every form: {form: train_data}."""
    return write_forms(rows, tmp_path_factory.mktemp("forms"))
