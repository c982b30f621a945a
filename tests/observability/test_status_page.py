"""The live status page in a real browser (headless Chromium), against a real proxy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from hsm.messages import KeyType
from tests.backends import backend
from tests.proxy import Proxy, free_port, make_site, running_proxy, site_config
from tests.unit.serve.test_admin import Fixture
from tlsproxy.serve.admin import AdminServer

KEYS = {"www": KeyType.ECDSA_P256}
DESKTOP, PHONE = (1280, 900), (390, 844)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CONTRASTS = """
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[0-9.]+/g).map(Number).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const background = (element) => {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (!colour.startsWith("rgba(0, 0, 0, 0")) return colour;
  }
};
const contrast = (colour, element) => {
  for (let outer = element; outer; outer = outer.parentElement)
    if (getComputedStyle(outer).opacity !== "1") throw new Error("no colours are mixed, so that they can be judged");
  const [low, high] = [luminance(colour), luminance(background(element))].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const found = [];
const texts = "h1, h2, .badge, a, dt, dd, small, th, td, label, legend, b, li";
for (const element of document.querySelectorAll(texts))
  if (element.textContent)
    found.push(["text", element.textContent, contrast(getComputedStyle(element).color, element)]);
for (const element of document.querySelectorAll("svg text"))
  found.push(["text", element.textContent, contrast(getComputedStyle(element).fill, element.closest("section"))]);
for (const line of document.querySelectorAll(".series"))
  found.push(["line", line.getAttribute("class"), contrast(getComputedStyle(line).stroke, line.closest("section"))]);
return found;
"""


class Browser:
    """What a test does with the page; it may wait for it, in a thread."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def resize(self, size: tuple[int, int]) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str, *arguments: str) -> Any:
        return self.driver.execute_script(script, *arguments)

    # The page changes by itself: what is to be read is found and read in one step.

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def cells(self, caption: str) -> list[str]:
        """Return the first row of a table."""
        row = f"[aria-label^='{caption}'] tbody tr:first-child > *"
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map((cell) => cell.innerText)", row))

    def label(self, chart: str) -> str:
        return str(self.run(f"return document.querySelector('#{chart} svg').getAttribute('aria-label')"))

    def press(self, key: str) -> str:
        """Press a key where the focus is; return what has the focus then."""
        webdriver.ActionChains(self.driver).send_keys(key).perform()
        return str(
            self.run(
                "const e = document.activeElement; return e.getAttribute('aria-label') ?? e.value ?? e.textContent"
            )
        )

    def contrasts_too_low(self) -> list[Any]:
        """Return texts below 4.5:1 and lines below 3:1, in either colour scheme (WCAG 2.2, 1.4.3 and 1.4.11)."""
        low = []
        for scheme in ("light", "dark"):
            self.prefer(scheme)
            contrasts = self.run(CONTRASTS)
            assert len(contrasts) > 100
            low += [[scheme, *found] for found in contrasts if found[2] < {"text": 4.5, "line": 3.0}[found[0]]]
        return low

    def complaints(self) -> list[str]:
        """Return what the console has, but for connections refused while there is no proxy."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["source"] != "network"]


async def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(300):
        if await asyncio.to_thread(condition):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"never: {what}")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = "/usr/bin/chromium"
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    driver.set_page_load_timeout(30)
    yield Browser(driver)
    driver.quit()


@contextlib.asynccontextmanager
async def under_load(proxy: Proxy) -> AsyncIterator[None]:
    async def load() -> None:
        while True:
            await proxy.get()
            await asyncio.sleep(0.02)

    task = asyncio.create_task(load())
    yield
    task.cancel()
    await asyncio.wait([task])


def open_page(browser: Browser, proxy: Proxy) -> None:
    browser.driver.get(f"http://127.0.0.1:{proxy.admin_port}/")


async def test_it_shows_the_figures_and_keeps_up_with_them(tmp_path: Path, browser: Browser) -> None:
    make_site(tmp_path, KEYS)
    async with backend() as app, running_proxy(tmp_path, site_config(tmp_path, KEYS, f"127.0.0.1:{app.port}")) as proxy:
        browser.resize(DESKTOP)
        async with under_load(proxy):
            await asyncio.to_thread(open_page, browser, proxy)
            await until(lambda: browser.text("#state") == "Ready", "connected")
            await until(lambda: "full 0," not in browser.label("rates"), "handshakes are counted")
            await until(lambda: " ms" in browser.label("duration"), "durations are measured")
            browser.run(
                "window.said = 0; new MutationObserver(() => window.said++).observe("
                "  document.querySelector('[role=status]'), { childList: true, characterData: true, subtree: true });"
            )
            first = browser.label("duration")
            await until(lambda: browser.label("duration") != first, "an update")
            assert browser.run("return window.said") == 0  # a screen reader would say it each second
            await until(
                lambda: browser.run("return document.querySelector('#phases path.s3').getAttribute('d').length") > 20,
                "a line",
            )
            assert browser.cells("Tokens")[:3] == ["local", "up", "closed"]
            assert browser.cells("Certificates")[0] == "www"
            assert browser.cells("Upstreams")[0] == "app"
            assert browser.cells("Listeners")[0] == proxy.config["listeners"][0]["address"]
            await until(lambda: "ecdsa_secp256r1_sha256" in browser.cells("Slowest"), "slow handshakes")
        await asyncio.to_thread(keyboard_reaches_everything, browser)
        for size in (DESKTOP, PHONE):
            browser.resize(size)
            assert browser.run("return document.documentElement.scrollWidth") <= size[0]
        assert browser.contrasts_too_low() == []
        assert browser.complaints() == []


def keyboard_reaches_everything(browser: Browser) -> None:
    """Tab goes through links, the choice of quantile and the tables that may need scrolling, in that order."""
    browser.run("document.activeElement.blur()")
    expected = [
        "Skip to the figures",
        "Metrics",
        "Slowest handshakes",
        "Health",
        "Readiness",
        "0",
        "Tokens",
        "Upstreams",
        "Upstream servers",
    ]
    assert [browser.press(Keys.TAB) for _ in expected] == expected
    before = browser.label("phases")
    browser.run("document.querySelector('input[name=quantile]').focus()")
    assert browser.press(Keys.ARROW_RIGHT) == "1"
    assert browser.label("phases") != before


async def test_it_comes_back_when_the_proxy_is_restarted(tmp_path: Path, browser: Browser) -> None:
    make_site(tmp_path, KEYS)
    config = site_config(tmp_path, KEYS, "127.0.0.1:9")
    async with running_proxy(tmp_path, config) as proxy:
        await asyncio.to_thread(open_page, browser, proxy)
        await until(lambda: browser.text("#state") == "Ready", "connected")
    await until(lambda: browser.text("#state").startswith("Reconnecting; "), "it notices that the proxy is gone")
    async with running_proxy(tmp_path, config) as proxy:
        await until(lambda: browser.text("#state") == "Ready", "connected again")
        await proxy.handshake()
        await until(lambda: browser.cells("Listeners")[2] == "1", "figures of the new proxy")
    assert browser.complaints() == []


async def test_it_says_which_server_of_an_upstream_is_down_and_when_it_is_back(
    tmp_path: Path, browser: Browser
) -> None:
    make_site(tmp_path, KEYS)
    port = free_port()
    async with backend() as steady, contextlib.AsyncExitStack() as stack:
        servers = [{"address": f"127.0.0.1:{steady.port}"}, {"address": f"127.0.0.1:{port}"}]
        upstream = {"name": "app", "servers": servers, "health": {"interval": "200ms", "rise": 1, "fall": 1}}
        proxy = await stack.enter_async_context(
            running_proxy(tmp_path, site_config(tmp_path, KEYS, "", upstreams=[upstream], workers=2))
        )
        async with backend(port=port):
            await asyncio.to_thread(open_page, browser, proxy)
            await until(lambda: browser.cells("Upstreams")[:2] == ["app", "2 of 2 up"], "both up")
            assert browser.text("#state") == "Ready"
            assert browser.text("#tiles div:last-child") == "Servers up\n2 of 2"
        await until(lambda: browser.cells("Upstreams")[:2] == ["app", "1 of 2 up"], "one down")
        await until(lambda: browser.cells("Upstream servers")[:3] == [f"127.0.0.1:{port}", "down", "app"], "its name")
        assert browser.text("#state") == "Ready; 1 of 2 upstream servers down"
        assert browser.text("#tiles div:last-child") == "Servers up\n1 of 2"
        assert browser.run("return document.title") == "Ready; 1 of 2 upstream servers down - tlsproxy"
        await stack.enter_async_context(backend(port=port))
        await until(lambda: browser.text("#state") == "Ready", "back")
        assert browser.cells("Upstreams")[:2] == ["app", "2 of 2 up"]
    assert browser.complaints() == []


async def test_it_says_when_clients_cannot_be_served(tmp_path: Path, browser: Browser) -> None:
    make_site(tmp_path, KEYS)
    async with running_proxy(tmp_path, site_config(tmp_path, KEYS, "127.0.0.1:9")) as proxy:
        await asyncio.to_thread(open_page, browser, proxy)
        await until(lambda: browser.text("#state") == "Ready", "connected")
        (tmp_path / "token").rename(tmp_path / "token.away")
        for worker in proxy.hsm_workers:
            os.kill(worker, signal.SIGKILL)
        await until(lambda: browser.text("#state").startswith("Not ready"), "not ready")
        assert browser.cells("Tokens")[1] == "down"


@contextlib.asynccontextmanager
async def running_admin_port(source: Fixture) -> AsyncIterator[None]:
    listening = socket.create_server(("127.0.0.1", source.port))
    source.port = listening.getsockname()[1]
    server = AdminServer(listening, source)
    await server.start()
    try:
        yield
    finally:
        await server.close()


async def test_trouble_is_said_in_text_that_is_readable_and_so_are_figures_that_are_old(browser: Browser) -> None:
    source = Fixture()
    source.token_up = False
    source.server_up = False
    source.name = "<img src=x onerror=document.title='hacked'>"
    async with running_admin_port(source):
        await asyncio.to_thread(browser.driver.get, f"http://127.0.0.1:{source.port}/")
        await until(lambda: browser.text("#state") == "Not ready: new clients cannot be served", "not ready")
        assert browser.cells("Certificates")[:2] == [source.name, "expired"]
        assert browser.cells("Tokens")[1] == "down"
        assert browser.cells("Upstream servers")[1] == "down"
        assert await asyncio.to_thread(browser.contrasts_too_low) == []
        browser.resize(PHONE)
        assert browser.run("return document.documentElement.scrollWidth") == PHONE[0]
    await until(lambda: browser.text("#state").startswith("Reconnecting; the figures are of "), "they are old")
    assert browser.contrasts_too_low() == []
    assert browser.run("return document.querySelectorAll('img').length") == 0


async def test_another_version_brings_its_own_page(browser: Browser) -> None:
    source = Fixture()
    async with running_admin_port(source):
        await asyncio.to_thread(browser.driver.get, f"http://127.0.0.1:{source.port}/")
        await until(lambda: browser.text("#version") == "9", "connected")
        browser.run("window.old = true")
    source.version = "10"
    async with running_admin_port(source):
        await until(lambda: browser.text("#version") == "10", "connected again")
        await until(lambda: browser.run("return window.old") is None, "loaded again")
    assert browser.complaints() == []


async def test_nothing_jumps_while_figures_come_in(tmp_path: Path, browser: Browser) -> None:
    make_site(tmp_path, KEYS)
    async with backend() as app, running_proxy(tmp_path, site_config(tmp_path, KEYS, f"127.0.0.1:{app.port}")) as proxy:
        browser.resize(DESKTOP)
        async with under_load(proxy):
            await asyncio.to_thread(open_page, browser, proxy)
            browser.run(
                "window.shift = 0; new PerformanceObserver((list) => {"
                "  for (const entry of list.getEntries()) window.shift += entry.value;"
                "}).observe({ type: 'layout-shift', buffered: true });"
            )
            await until(lambda: "ecdsa_secp256r1_sha256" in browser.cells("Slowest"), "all tables have rows")
            # What Web Vitals calls good.
            assert browser.run("return window.shift") < 0.1
