import faulthandler
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # plain `pytest` finds the modules of the repository root


def pytest_configure(config):
    config.option.reportchars += "s"  # without requirements-wan.txt the tests of wan/ are skipped: say so, and why
    config.addinivalue_line("markers", 'slow: trainings, processes, the real world; leave out with -m "not slow"')


def pytest_unconfigure(config):
    """Tests that passed and never end are a fault too: after two minutes it says where it hangs."""
    faulthandler.dump_traceback_later(120, file=sys.__stderr__)


@pytest.fixture(scope="module")
def one_codec():
    """Every World shares one codec: it has no state, and to build it takes longer than most tests."""
    import toy

    codec = toy.Codec()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "Codec", lambda: codec)
        yield
