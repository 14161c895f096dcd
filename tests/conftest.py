import faulthandler
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # plain `pytest` finds the project's modules


def pytest_configure(config):
    config.option.reportchars += "s"  # say which tests of wan/ are skipped, and why
    slow = 'slow: trainings, processes, the real world; leave out with -m "not slow"'
    config.addinivalue_line("markers", slow)
    config.addinivalue_line("markers", "cuda: needs a GPU")


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="torch finds no CUDA GPU")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


def pytest_unconfigure(config):
    """A finished run that does not end is a fault, too: it says where it hangs after 2 minutes."""
    if hasattr(config, "workerinput"):  # pytest-xdist's: it waits for the others
        return
    faulthandler.dump_traceback_later(120, file=sys.__stderr__)


def refusal(capsys, main, *argv):
    """The one line with which a program's `main` refuses these flags."""
    with pytest.raises(SystemExit) as end:
        main([str(flag) for flag in argv])
    code, said = end.value.code, capsys.readouterr()
    line = (code if isinstance(code, str) else said.err).strip()
    assert code not in (0, None)
    assert "\n" not in line and ": error: " in line, line
    return line


@pytest.fixture(scope="module")
def one_codec():
    """Every World shares one codec: it has no state, and is slower to build than most tests."""
    import toy

    codec = toy.Codec()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "Codec", lambda: codec)
        yield


# ---------------------------------------------------------------- pages, in a real browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if not BROWSER:
        pytest.skip("no browser is installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox"]
        )  # CI's root cannot have chromium's sandbox
        yield chromium
        chromium.close()


@pytest.fixture
def view(browser):
    """Opens a page of file://. At the end asserts that it asked for nothing else, and said nothing
    on the console.
    """
    contexts, asked, said = [], [], []

    def open_page(path, **options):
        contexts.append(browser.new_context(offline=True, **options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(Path(path).resolve().as_uri())
        return page

    yield open_page
    assert [url.split(":")[0] for url in asked if not url.startswith("data:")] == ["file"] * len(
        contexts
    ) and said == []
    for context in contexts:
        context.close()
