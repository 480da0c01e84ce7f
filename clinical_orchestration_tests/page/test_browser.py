"""The page in a real Chromium, over a real Dagster on PostgreSQL whose runs execute."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from clinical_orchestration_tests.airflow import tiny_definitions
from clinical_orchestration_tests.airflow.live import ADMIN, VIEWER, live_page
from clinical_orchestration_tests.databases import new_database

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.integration

MAIN, QUALITY = "clinical_data_pipeline", "data_quality_monitoring"
DESKTOP, PHONE = (1280, 900), (390, 844)
WAIT = 20_000  # ms


@dataclass
class Site:
    """The page as it is served, and the file in which the supervisor of a stack writes."""

    url: str
    status_file: Path
    sessions: dict[str, Any] = field(default_factory=dict)
    """Cookies of who has logged in before."""

    def services(self, **states: str) -> None:
        """Write what the supervisor says of its services."""
        services = [
            {"name": name, "title": name.title(), "level": level, "state": states.get(name, "healthy"),
             "pid": os.getpid(), "latency_ms": 4.2, "error": "it was killed" if name in states else None}
            for level, name in enumerate(("kafka", "gateway", "spark", "redis", "mlflow", "daemon"))
        ]  # fmt: skip
        whole = self.status_file.with_suffix(".new")
        whole.write_text(json.dumps({"services": services, "level": 5}))
        whole.replace(self.status_file)


@dataclass
class Tab:
    """A page of the browser, and what it complained about."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def pipeline(self, dag_id: str) -> Locator:
        return self.page.locator(f"#pipeline-{dag_id}")


@pytest.fixture(scope="module")
def site(postgres_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home: Path = tmp_path_factory.mktemp("page")
    (home / "run").mkdir()
    with live_page(new_database(postgres_env["POSTGRES_URL"], "page_view"), home, stack=str(home)) as live:
        found = Site(live.url, home / "run" / "status.json")
        found.services()
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no Chromium; on Debian: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def nothing_is_made_to_fail() -> Iterator[None]:
    yield
    tiny_definitions.failing.clear()
    for event in tiny_definitions.holding.values():
        event.set()
    tiny_definitions.holding.clear()


@contextmanager
def signed_in(
    chromium: Browser, site: Site, size: tuple[int, int], user: str = ADMIN, scheme: Any = "light"
) -> Iterator[Tab]:
    """A tab of its own with the session of a user, who logs in once."""
    with ExitStack() as stack:
        context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, has_touch=size == PHONE,
            storage_state=site.sessions.get(user),
        )  # fmt: skip
        stack.callback(context.close)
        context.set_default_timeout(WAIT)
        context.add_init_script(HURRY)
        tab = Tab(context.new_page())
        tab.page.goto(site.url)
        if user not in site.sessions:
            name, _, password = user.partition(":")
            tab.page.get_by_label("User name").fill(name)
            tab.page.get_by_label("Password").fill(password)
            tab.page.get_by_role("button", name="Log in").click()
        tab.page.wait_for_selector("#pipelines-now .pipeline")
        site.sessions.setdefault(user, context.storage_state())
        tab.page.on("console", lambda message: tab.complaints.append(message.text) if message.type == "error" else None)
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        yield tab


def expect_text(page: Page, selector: str, text: str | re.Pattern[str]) -> None:
    page.locator(selector).filter(has_text=text).wait_for(state="attached")


def mark(page: Page) -> Callable[[], bool]:
    """Return what says whether the document is still the same: a reload would lose the mark."""
    page.evaluate("window.marked = true")
    return lambda: page.evaluate("window.marked === true")


SIZES = pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])


@SIZES
def test_pausing_triggering_and_following_a_run(chromium: Browser, site: Site, size: tuple[int, int]) -> None:
    with signed_in(chromium, site, size) as tab:
        page = tab.page
        same = mark(page)
        switch = tab.pipeline(QUALITY).get_by_role("switch")
        assert switch.get_attribute("aria-checked") == "true"
        switch.click()
        page.wait_for_selector(f"#pipeline-{QUALITY} [aria-checked=false]")
        assert "none" in tab.pipeline(QUALITY).locator("dl").inner_text()  # no next run
        page.keyboard.press("Space")  # focus stayed on the switch, which the keyboard works too
        page.wait_for_selector(f"#pipeline-{QUALITY} [aria-checked=true]")
        assert same()

        gate = tiny_definitions.holding["train_model"] = threading.Event()
        tab.pipeline(MAIN).get_by_role("button", name=f"Trigger {MAIN}").click()
        dialog = page.get_by_role("dialog", name=f"Trigger {MAIN}")
        conf = dialog.get_by_label("Configuration")
        for wrong, said in (("{", "This is no JSON"), ("[1]", "must be a JSON object")):
            conf.fill(wrong)
            dialog.get_by_role("button", name="Trigger").click()
            assert said in page.get_by_role("alert").inner_text()
            assert conf.get_attribute("aria-invalid") == "true"
        conf.fill('{"param1": "value1"}')
        dialog.get_by_label("Logical date").focus()
        page.keyboard.type("10")  # a month and no more
        dialog.get_by_role("button", name="Trigger").click()
        assert "not complete" in page.get_by_role("alert").inner_text()
        dialog.get_by_label("Note (optional)").fill("by hand")
        dialog.get_by_label("Logical date").fill(f"2025-10-25T00:00:{size[0] % 60:02d}")
        dialog.get_by_role("button", name="Trigger").click()
        page.get_by_role("link", name="Show the run").click()

        page.wait_for_selector("#run-head .s-running")
        page.wait_for_selector("#node-train_model.s-running")
        same = mark(page)
        assert page.locator("#row-extract_features .s-success").count() == 1
        assert '"param1": "value1"' in page.locator("#conf-now").inner_text()
        assert "by hand" in page.locator("#conf-now").inner_text()
        gate.set()
        page.wait_for_selector("#run-head .s-success")
        page.wait_for_selector("#node-end_pipeline.s-success")
        assert same(), "the page was loaded again"
        assert page.locator("#heard").inner_text() == "The run has succeeded."
        assert page.title().startswith("success: ")

        page.get_by_role("link", name="Log of train_model, try 1").click()
        expect_text(page, "#log", "working on train_model")
        assert "working on evaluate_model" not in page.locator("#log").inner_text()

        page.goto(site.url)
        tab.pipeline(MAIN).get_by_role("button", name=f"Trigger {MAIN}").click()
        dialog = page.get_by_role("dialog", name=f"Trigger {MAIN}")
        dialog.get_by_label("Logical date").fill(f"2025-10-25T00:00:{size[0] % 60:02d}")
        with page.expect_response(re.compile("/dagRuns$")) as refused:
            dialog.get_by_role("button", name="Trigger").click()
        assert refused.value.status == 409
        expect_text(page, "#trigger-error", "already exists")
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        # the browser itself reports the refused request on its console
        assert [text for text in tab.complaints if "409" not in text] == []


def test_a_failed_run_leads_to_its_log_and_is_cleared(chromium: Browser, site: Site) -> None:
    tiny_definitions.failing.add("detect_anomalies")
    with signed_in(chromium, site, DESKTOP) as tab:
        page = tab.page
        tab.pipeline(QUALITY).get_by_role("button", name=f"Trigger {QUALITY}").click()
        page.get_by_role("dialog").get_by_role("button", name="Trigger").click()
        page.wait_for_selector(f"#pipeline-{QUALITY} .bar.s-failed")
        expect_text(page, "#summary", "1 pipeline failed last")
        assert f"{QUALITY} failed." in page.locator("#heard").inner_text()
        page.locator(f"#pipeline-{QUALITY} .bar.s-failed").click()
        assert page.locator("#row-generate_quality_report .s-upstream_failed").count() == 1
        page.get_by_role("link", name="read its log").click()
        expect_text(page, "#log", "made to fail")

        tiny_definitions.failing.clear()
        same = mark(page)
        page.get_by_role("button", name="Clear failed tasks").click()
        page.get_by_role("dialog").get_by_role("button", name="No").click()
        assert page.locator("#run-head .state.s-failed").count() == 1
        page.get_by_role("button", name="Clear failed tasks").click()
        page.get_by_role("dialog").get_by_role("button", name="Yes").click()
        page.wait_for_selector("#run-head .state.s-success")
        page.wait_for_selector("#row-detect_anomalies >> text=log 2")
        page.get_by_text("Change the note").click()
        page.get_by_role("textbox", name="Note").fill("looked into it")
        page.get_by_role("button", name="Save note").click()
        expect_text(page, "#conf-now", "looked into it")
        assert same()
        assert tab.complaints == []


@SIZES
def test_a_failing_service_turns_red_and_back(chromium: Browser, site: Site, size: tuple[int, int]) -> None:
    with signed_in(chromium, site, size) as tab:
        page = tab.page
        same = mark(page)
        page.wait_for_selector("#service-mlflow .s-success")
        assert "4.2 ms" in page.locator("#service-mlflow").inner_text()
        site.services(mlflow="unhealthy")
        page.wait_for_selector("#service-mlflow .s-failed")
        assert "it was killed" in page.locator("#service-mlflow").inner_text()
        red, green, blue = rgb(page, "#service-mlflow .state")
        assert red > 2 * max(green, blue)
        assert "Mlflow is unhealthy." in page.locator("#heard").inner_text()
        site.services()
        page.wait_for_selector("#service-mlflow .s-success")
        assert same()
        assert tab.complaints == []


def test_a_viewer_sees_everything_and_can_change_nothing(chromium: Browser, site: Site) -> None:
    with signed_in(chromium, site, DESKTOP, VIEWER) as tab:
        page = tab.page
        assert "Signed in as looker (Viewer)" in page.locator(".who").inner_text()
        buttons = page.locator("#pipelines-now button")
        assert buttons.count() == 2 * len(tiny_definitions.PIPELINES)
        assert all(one.is_disabled() for one in buttons.all())
        assert {one.get_attribute("title") for one in buttons.all()} == {"Your roles let you look, not change."}
        # who makes the button work by hand is refused by the API
        page.evaluate("document.querySelectorAll('[role=switch]').forEach((one) => { one.disabled = false; })")
        with page.expect_response(re.compile("/api/v1/dags/")) as refused:
            tab.pipeline(MAIN).get_by_role("switch").click()
        assert refused.value.status == 403
        page.wait_for_selector("#message:not([hidden])")
        assert tab.pipeline(MAIN).get_by_role("switch").get_attribute("aria-checked") == "true"
        del site.sessions[VIEWER]
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_selector("input[type=password]")


def test_what_one_does_is_not_disturbed_by_what_comes_in(chromium: Browser, site: Site) -> None:
    with signed_in(chromium, site, DESKTOP) as tab:
        page = tab.page
        tab.pipeline(MAIN).get_by_role("button", name=f"Trigger {MAIN}").click()
        conf = page.get_by_label("Configuration")
        conf.fill('{"half": ')
        with page.expect_response(lambda answer: answer.url == f"{site.url}/"):
            pass
        page.wait_for_timeout(100)
        assert conf.input_value() == '{"half": '
        assert page.evaluate("document.activeElement.id") == "trigger-conf"
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.textContent") == "Trigger…"
        with page.expect_response(lambda answer: answer.url == f"{site.url}/"):
            pass
        page.wait_for_timeout(100)
        assert page.evaluate("document.activeElement.dataset.dag") == MAIN

        # the bars are one stop of the tabulator; arrow keys move among them
        bars = page.locator(f"#pipeline-{MAIN} .bar")
        assert bars.count() >= 2
        assert page.locator(f"#pipeline-{MAIN} .bar:not([tabindex])").count() == 1
        page.locator(f"#pipeline-{MAIN} .bar:not([tabindex])").focus()
        page.keyboard.press("ArrowLeft")
        chosen = page.evaluate("document.activeElement.getAttribute('href')")
        assert chosen == bars.nth(bars.count() - 2).get_attribute("href")

        # nothing is asked while nobody looks
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.evaluate(HIDE, True)
        page.wait_for_timeout(200)
        asked.clear()
        page.wait_for_timeout(1500)
        assert asked == []
        page.evaluate(HIDE, False)
        wait_for_request(page, asked)
        assert tab.complaints == []


def test_a_session_that_ended_asks_to_sign_in(chromium: Browser, site: Site) -> None:
    with signed_in(chromium, site, DESKTOP) as tab:
        tab.page.context.clear_cookies()
        link = tab.page.locator("#message a")
        link.wait_for()
        assert (link.inner_text(), link.get_attribute("href")) == ("Sign in", "/login?next=%2F")


def test_the_dagster_ui_opens(chromium: Browser, site: Site) -> None:
    with signed_in(chromium, site, DESKTOP) as tab:
        tab.page.get_by_role("link", name=f"Graph of {MAIN}").click()
        tab.page.wait_for_url(re.compile("/dagster/locations/"))
        tab.page.get_by_text("View 10 assets").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_is_readable_and_fits(chromium: Browser, site: Site, scheme: str) -> None:
    with signed_in(chromium, site, PHONE, scheme=scheme) as tab:
        page = tab.page
        site.services(mlflow="unhealthy", redis="starting")
        page.wait_for_selector("#service-mlflow .s-failed")
        run = page.locator(f"#pipeline-{MAIN} .when a").get_attribute("href")
        places = ["/", f"{run}?task=train_model", "/runs/none/none"]
        for place in places:
            page.goto(site.url + place)
            for width in (360, 390, 768, 1280):
                page.set_viewport_size({"width": width, "height": 844})
                assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{place} at {width}"
            assert_named(page)
            assert page.evaluate(UNREADABLE) == []
        page.goto(site.url)
        page.get_by_role("button", name=f"Trigger {MAIN}").click()
        page.set_viewport_size({"width": 360, "height": 700})
        assert page.evaluate("document.querySelector('#trigger').getBoundingClientRect().right") <= 360
        assert_named(page)
        assert page.evaluate(UNREADABLE) == []
        site.services()


def assert_named(page: Page) -> None:
    """Every control and picture has a name for who does not see it, and no two elements share an id."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    nameless = [
        node["role"]["value"]
        for node in nodes
        if not node.get("ignored")
        and node["role"]["value"] in ("button", "switch", "link", "textbox", "dialog", "image", "region", "heading")
        and not node.get("name", {}).get("value", "").strip()
    ]
    assert nameless == []
    roles = {node["role"]["value"] for node in nodes}
    assert {"main", "banner", "contentinfo"} <= roles or "dialog" in roles
    twice = "[...document.querySelectorAll('[id]')].map((e) => e.id).filter((id, n, all) => all.indexOf(id) !== n)"
    assert page.evaluate(twice) == []


def rgb(page: Page, selector: str) -> tuple[int, int, int]:
    text = page.locator(selector).evaluate("(element) => getComputedStyle(element).color")
    red, green, blue = (int(part) for part in re.findall(r"\d+", text)[:3])
    return red, green, blue


def wait_for_request(page: Page, asked: list[str]) -> None:
    for _ in range(50):
        if asked:
            return
        page.wait_for_timeout(100)
    raise AssertionError("nothing was asked when the tab was seen again")


# the page looks again every 3 s; a test need not wait so long
HURRY = """const wait = window.setTimeout;
window.setTimeout = (act, milliseconds, ...rest) => wait(act, milliseconds / 4, ...rest);"""

HIDE = """(hidden) => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""

# WCAG 2.1: contrast of every visible text with what lies behind it, 4.5 at least (3 for large text)
UNREADABLE = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((part, n) => part * a + under[n] * (1 - a));
  const luminance = (colour) => {
    const linear = (part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.unshift(paint(getComputedStyle(at).backgroundColor));
    return layers.reduce((under, layer) => over(layer, under), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    const style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    if (!node.data.trim() || !element.checkVisibility() || box.width < 2 || element.closest("title")) continue;
    const drawn = element.closest("svg");
    const box_of = drawn && element.parentElement.querySelector("rect");
    const under = drawn ? over(paint(getComputedStyle(box_of).fill), behind(drawn)) : behind(element);
    const text = over(paint(drawn ? style.fill : style.color), under);
    const [light, dark] = [luminance(text), luminance(under)].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)}: ${node.data.trim().slice(0, 40)}`);
  }
  return found;
}"""
