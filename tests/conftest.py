import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # plain `pytest` finds the modules of the repository root


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: trains the toy for minutes; leave out with -m "not slow"')
