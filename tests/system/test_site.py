"""The documentation as a site, looked at in a browser.

Needs Sphinx, Selenium and Chromium: python -m pip install -e ".[site]", and from the
system chromium and its driver. Without, the tests are skipped, or fail if
LALERG_REQUIRE_BROWSER is set.
"""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse

import pytest
from helpers.paths import DOCS, ROOT

NOTEBOOKS = ROOT / "notebooks"
PAGES = [page.stem for page in sorted(DOCS.glob("*.md"))] + ["api", "results/noise"]
PAGES += [f"notebooks/{path.stem}" for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
WIDTHS = (390, 1280)  # CSS pixels: a telephone and a screen

if not os.environ.get("LALERG_REQUIRE_BROWSER"):
    for package in ("selenium", "sphinx", "furo", "myst_nb", "sphinx_copybutton"):
        pytest.importorskip(package)
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no chromium", allow_module_level=True)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("site"),
    pytest.mark.filterwarnings("default"),  # of other packages
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Returns where the site is served."""
    built = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", DOCS, built],
        check=True,
    )
    handler = functools.partial(Quiet, directory=built)
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def show(browser, address, width):
    """Opens a page in a window of that many CSS pixels, and waits for its equations."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.get(address)
    browser.execute_async_script(
        "const done = arguments[0];"
        "const ready = window.MathJax?.startup?.promise ?? Promise.resolve();"
        "ready.then(() => setTimeout(done, 50));"
    )


def requests_of(browser):
    """Returns address and status of what was asked for since the last call."""
    found = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.responseReceived":
            response = message["params"]["response"]
            found.append((response["url"], response["status"]))
        elif message["method"] == "Network.requestWillBeSent":
            found.append((message["params"]["request"]["url"], 0))
    # the page that a browser opens with is its own
    return [(url, status) for url, status in found if not url.startswith("chrome")]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_whole_and_fits(site, browser, page, width):
    requests_of(browser)
    show(browser, f"{site}/{page}.html", width)
    severe = [
        e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"
    ]
    assert not severe
    asked = requests_of(browser)
    assert len(asked) > 3
    hosts = {urllib.parse.urlsplit(url).hostname for url, _ in asked}
    assert hosts <= {"localhost", None, ""}  # None: data that a page brings along
    assert not [(url, status) for url, status in asked if status >= 400]
    broken = browser.execute_script(
        "return [...document.images].filter("
        "i => i.loading !== 'lazy' && !(i.complete && i.naturalWidth)).map(i => i.src)"
    )
    assert not broken
    # what is wider than the page scrolls by itself
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width


def test_equations_are_rendered(site, browser):
    show(browser, f"{site}/algorithm.html", 1280)
    count = browser.execute_script(
        "return document.querySelectorAll('mjx-container').length"
    )
    assert count > 20
    assert not browser.execute_script(
        "return document.querySelectorAll('mjx-merror').length"
    )


def test_the_way_to_the_algorithm_begins_on_the_first_page(site, browser):
    from selenium.webdriver.common.by import By

    show(browser, f"{site}/index.html", 1280)
    browser.find_element(By.PARTIAL_LINK_TEXT, "Ten minutes").click()
    assert browser.current_url.endswith("tutorial.html")
    browser.find_element(By.PARTIAL_LINK_TEXT, "The algorithm").click()
    assert browser.current_url.endswith("algorithm.html")
