"""One service for all tests that need a cluster."""

import pytest

from tests.launch.process import short_folder
from tests.launch.serve.service import Service


@pytest.fixture(scope="session")
def service(tmp_path_factory):
    with short_folder() as temporary:
        service = Service(tmp_path_factory.mktemp("service"), temporary)
        service.start()
        try:
            yield service
        finally:
            service.process.kill()
            service.process.wait()
