import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # plain `pytest` finds the modules of the repository root


def pytest_configure(config):
    config.option.reportchars += "s"  # without requirements-wan.txt the tests of wan/ are skipped: say so, and why
    config.addinivalue_line("markers", 'slow: trainings, processes, the real world; leave out with -m "not slow"')
