"""The page in a real browser, at desktop and phone width, light and dark: no error, no request, nothing too wide."""

import json
import os
import shutil

import pytest

from maskalign.reporting.command import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
)  # fmt: skip
DESKTOP, PHONE = (1280, 900, False), (390, 844, True)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        message = "no Chromium with its chromedriver here (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("MASKALIGN_NEEDS_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)  # a user's machine may lack it; .ci/run sets the variable and fails instead
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory, write_run):
    """Three runs with everything on the page, names and settings of awkward length among it."""
    folder = tmp_path_factory.mktemp("runs")
    long = "a-run-with-a-name-that-is-far-too-long-for-a-phone-and-without-a-single-blank-in-it"
    runs = [
        write_run(folder / "maskalign", keep=0.5, loss=0.9),
        write_run(folder / "repa", keep=1.0, loss=1.1, steps=(100, 300), analysis=False),
        write_run(folder / long, keep=0.25, notes="x" * 90 + "</script><script>throw 1</script>"),
    ]
    return report(runs, folder / "report.html")[0]


def opened(browser, page, size, scheme="light"):
    width, height, mobile = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": name, "value": value} for name, value in features.items()]}
    )
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_error_no_request_and_nothing_too_wide(browser, page, size, scheme):
    opened(browser, page, size, scheme)
    assert browser.get_log("browser") == []
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in urls and all(url == page.as_uri() or url.startswith("data:") for url in urls)
    wide, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner == size[0]
    # Nothing sticks out of the page but what scrolls in a box of its own.
    outside = browser.execute_script("""
        return [...document.querySelectorAll("main *, header *, footer *")].filter((element) => {
          const box = element.getBoundingClientRect();
          const out = box.width && (box.right > innerWidth + 1 || box.left < -1);
          return out && !element.closest(".scroll, .hidden, svg");
        }).map((element) => element.outerHTML.slice(0, 80));
    """)
    assert outside == []
    assert browser.execute_script("return document.querySelectorAll('.chart svg .line').length") > 10
    broken = "return [...document.images].filter((image) => !image.naturalWidth).length"
    assert browser.execute_script(broken) == 0


def luminance(color):
    channels = [int(part) / 255 for part in color[4:-1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_texts_and_colors_can_be_read(browser, page, scheme):
    """WCAG 2: 4.5 to 1 for texts, 3 to 1 for lines and marks."""
    opened(browser, page, DESKTOP, scheme)
    colors = browser.execute_script("""
        const probe = document.createElement("i");
        document.body.append(probe);
        const of = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
        const names = ["paper", "raised", "wash", "ink", "soft", "accent", ...[..."01234567"].map((k) => `c${k}`)];
        return Object.fromEntries(names.map((name) => [name, of(name)]));
    """)
    light = {name: luminance(color) for name, color in colors.items()}
    assert (light["paper"] < 0.1) == (scheme == "dark")
    for ground in ("paper", "raised", "wash"):
        for name in light.keys() - {"paper", "raised", "wash"}:
            ratio = (max(light[name], light[ground]) + 0.05) / (min(light[name], light[ground]) + 0.05)
            assert ratio >= (3 if name.startswith("c") else 4.5), (scheme, name, ground, ratio)


def test_curves_follow_the_cursor_the_axis_and_the_legend(browser, page):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    opened(browser, page, DESKTOP)
    chart = browser.find_element(By.CSS_SELECTOR, "[data-chart=velocity_loss]")
    svg, tip = chart.find_element(By.TAG_NAME, "svg"), chart.find_element(By.CLASS_NAME, "tip")
    assert not tip.is_displayed()
    ActionChains(browser).scroll_to_element(svg).move_to_element(svg).perform()
    assert tip.is_displayed() and "step" in tip.text and "maskalign" in tip.text and "repa" in tip.text
    assert chart.find_element(By.CSS_SELECTOR, "svg").text.splitlines()[-1] == "step"
    browser.find_element(By.CSS_SELECTOR, "[value=time] + span").click()
    assert svg.text.splitlines()[-1] == "seconds of training"
    lines = len(svg.find_elements(By.CLASS_NAME, "line"))
    legend = browser.find_elements(By.CSS_SELECTOR, ".legend button")
    legend[1].click()
    assert legend[1].get_attribute("aria-pressed") == "false"
    assert len(svg.find_elements(By.CLASS_NAME, "line")) == lines * 2 // 3
    browser.execute_script("arguments[0].focus()", svg)
    ActionChains(browser).send_keys(Keys.ARROW_LEFT).perform()
    assert tip.is_displayed() and "120 s" in tip.text and "repa" not in tip.text
    for button in legend:
        if button.get_attribute("aria-pressed") == "true":
            button.click()
    assert svg.text == "nothing to show"
    assert browser.get_log("browser") == []


def test_the_slider_shows_each_runs_newest_grid_up_to_a_step(browser, page):
    from selenium.webdriver.common.by import By

    opened(browser, page, PHONE)

    def shown():
        images = browser.find_elements(By.CSS_SELECTOR, ".sheet img:not([hidden])")
        return [int(image.get_attribute("data-step")) for image in images]

    assert shown() == [300, 300, 300]
    move = "const s = document.getElementById('step'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    browser.execute_script(move, 1)
    assert shown() == [200, 100, 200]
    assert browser.find_element(By.TAG_NAME, "output").text == "step 200"
    browser.find_element(By.ID, "play").click()
    assert browser.find_element(By.ID, "play").get_attribute("aria-label") == "Pause"
    browser.find_element(By.ID, "play").click()
    assert browser.find_element(By.ID, "play").get_attribute("aria-label") == "Play"
    assert browser.get_log("browser") == []
