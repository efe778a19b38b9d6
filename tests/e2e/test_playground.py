"""The page in a real browser, against the real service with the shipped model."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from entry.config import read_entry
from entry.images import Limits, load_image
from service.auth import new_key
from service.settings import Settings
from tests.serving import served
from tests.tiny import png, write_tiny_entry

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "model_repository" / "prg-cifar10"
SCENES = ROOT / "service" / "playground" / "scenes"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DESK, PHONE, SMALL = (1120, 900), (360, 740), (320, 640)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
    pytest.mark.slow,
]
Open = Callable[..., Page]
PATIENCE_S = 120
"""How long a busy machine may take to start the service, or to show something."""
expect.set_options(timeout=PATIENCE_S * 1e3)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the service: the shipped model, and a small one without classes."""
    models = tmp_path_factory.mktemp("models")
    (models / SHIPPED.name).symlink_to(SHIPPED)
    write_tiny_entry(models, "features-only", head=False)
    with served(Settings(model_repository=models, default_model=SHIPPED.name), PATIENCE_S) as found:
        yield f"http://{found}"


@pytest.fixture
def browser() -> Iterator[Browser]:
    """Started anew for each test: Playwright's event loop must not outlive it, other tests have their own."""
    with sync_playwright() as playwright:
        launch = playwright.chromium.launch
        running = launch(executable_path=CHROMIUM, args=list(FLAGS), timeout=PATIENCE_S * 1e3)
        yield running
        running.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Open an address; any request to another host, error in the console or exception fails the test."""
    wrong: list[str] = []

    def open_page(
        url: str, size: tuple[int, int] = DESK, scheme: Any = "light", motion: Any = None, allow: str = "^$"
    ) -> Page:
        host = re.match(r"https?://[^/]+", url)
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion=motion
        )

        def guard(route: Any) -> None:
            if host and route.request.url.startswith(host[0]):
                route.continue_()
            else:
                wrong.append(f"request to {route.request.url}")
                route.abort()

        def heard(message: Any) -> None:
            own = "willReadFrequently" in message.text  # of this test's reading the canvas
            if message.type in ("error", "warning") and not own and not re.search(allow, message.text):
                wrong.append(f"console: {message.text}")

        context.route("**/*", guard)
        context.set_default_timeout(PATIENCE_S * 1e3)
        page = context.new_page()
        page.on("console", heard)
        page.on("pageerror", lambda error: wrong.append(f"exception: {error}"))
        page.goto(url)
        return page

    yield open_page
    assert wrong == []


def choose(page: Page, picture: Path, slot: str = "#picture") -> None:
    page.set_input_files(f"{slot} input", picture)


def pixels(page: Page) -> np.ndarray:
    """[16, 16, 3] of the large picture of the trajectory."""
    canvas = "document.getElementById('state').getContext('2d')"
    values = page.evaluate(f"[...{canvas}.getImageData(0, 0, 16, 16).data]")
    return np.array(values).reshape(16, 16, 4)[..., :3]


def ready(page: Page) -> None:
    expect(page.locator("[aria-busy]")).to_have_count(0)


def test_a_picture_is_classified(visit: Open, address: str) -> None:
    page = visit(address)
    choose(page, SCENES / "car.jpg")
    first = page.locator("#classes .bars li").first
    expect(first).to_be_visible()
    answer = httpx.post(f"{address}/classify", files={"files": (SCENES / "car.jpg").read_bytes()}).json()
    best = answer["data"][0]["predictions"][0]
    expect(first.locator(".label")).to_have_text(best["label"])
    expect(first.locator(".percent")).to_have_text(f"{best['probability'] * 100:.1f} %")
    expect(page.locator("#classes .bars li")).to_have_count(5)
    expect(page.locator("#caveat")).not_to_be_empty()
    page.select_option("#count", "10")
    expect(page.locator("#classes .bars li")).to_have_count(10)
    ready(page)


def test_the_curl_line_does_what_was_done(visit: Open, address: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    odd = tmp_path / 'it\'s a; "ship", & $HOME.jpg'
    odd.write_bytes((SCENES / "ship.jpg").read_bytes())
    page = visit(address)
    choose(page, odd)
    done = page.locator("#classes .done")
    expect(done).to_contain_text("POST /classify answered in")
    done.locator("summary").click()
    command = done.locator("code").inner_text()
    ready(page)
    ran = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    label = page.locator("#classes .bars .label").first.inner_text()
    assert f'"predictions":[{{"label":"{label}"' in ran.stdout


def test_the_slider_moves_by_keyboard_and_at_one_the_state_is_the_picture(visit: Open, address: str) -> None:
    """So the page has undone the network's mean and deviation, which the service does not tell."""
    page = visit(address)
    choose(page, SCENES / "ship.jpg")
    slider, shown = page.locator("#t-end"), page.locator("#t-end-shown")
    expect(slider).to_be_visible()
    ready(page)
    expect(shown).to_have_text("t_end = 0.80")
    before = pixels(page)
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(shown).to_have_text("t_end = 0.75")
    expect(slider).to_have_attribute("aria-valuetext", "t_end 0.75")
    assert (pixels(page) != before).any()
    page.keyboard.press("End")
    expect(shown).to_have_text("t_end = 0.00")
    expect(page.locator(".strip [aria-pressed=true]")).to_have_text("0")
    page.keyboard.press("Home")
    expect(shown).to_have_text("t_end = 1.00")
    spec = read_entry(SHIPPED).prg.image
    image = load_image((SCENES / "ship.jpg").read_bytes(), spec, Limits(1 << 20, 1 << 20))
    pooled = image.reshape(3, 16, 2, 16, 2).mean((2, 4)).transpose(1, 2, 0)
    assert np.abs(pixels(page) - pooled).max() <= 1


def test_similarity(visit: Open, address: str) -> None:
    page = visit(address)
    choose(page, SCENES / "ship.jpg")
    page.get_by_label("Compare with the drawing of a ship").click()
    number = page.locator("#similarity .number")
    expect(number).to_have_text("1.00")
    choose(page, SCENES / "cup.jpg", "#second")
    expect(number).not_to_have_text("1.00")
    ready(page)
    assert -1 <= float(number.inner_text().replace("−", "-")) < 0.9
    expect(page.locator("#similarity .what")).to_have_text("cosine of the 256 numbers at t_end 0.8")


def test_a_model_without_classes_says_so(visit: Open, address: str) -> None:
    page = visit(address)
    choose(page, SCENES / "ship.jpg")
    expect(page.locator("#classes .bars li")).to_have_count(5)
    page.select_option("#model", "features-only")
    expect(page.locator("#classes .empty")).not_to_be_empty()
    expect(page.locator("#classes .bars li")).to_have_count(0)
    expect(page.locator("#caveat")).to_be_hidden()
    expect(page.locator(".strip li")).to_have_count(8)
    ready(page)


def test_errors_are_shown_in_words(visit: Open, address: str, tmp_path: Path) -> None:
    broken = tmp_path / "notes.png"
    broken.write_text("hello")
    page = visit(address, allow="422")
    choose(page, broken)
    expect(page.locator("#picture .name")).to_contain_text("notes.png")
    answer = httpx.post(f"{address}/classify", files={"files": broken.read_bytes()}).json()
    said = page.get_by_text(answer["data"][0]["error"]["detail"])
    expect(said).to_be_visible()
    ready(page)
    expect(said).to_have_count(1)
    expect(page.locator("#picture .another")).to_be_visible()
    page.get_by_label("Try the drawing of a ship").click()
    expect(page.locator("#classes .bars li")).to_have_count(5)
    expect(page.locator("#classes .status")).to_be_empty()
    ready(page)


def test_a_picture_is_pasted_and_dropped(visit: Open, address: str) -> None:
    page = visit(address)
    send = """([kind, bytes, place]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], kind + ".png", { type: "image/png" }));
        const init = { bubbles: true, cancelable: true };
        document.querySelector(place).dispatchEvent(kind === "paste"
            ? new ClipboardEvent("paste", { ...init, clipboardData: data })
            : new DragEvent("drop", { ...init, dataTransfer: data }));
    }"""
    page.evaluate(send, ["paste", list(png()), "body"])
    expect(page.locator("#picture .name")).to_have_text("paste.png")
    expect(page.locator("#classes .bars li")).to_have_count(5)
    page.evaluate(send, ["drop", list(png()), "#second"])
    expect(page.locator("#second .name")).to_have_text("drop.png")
    expect(page.locator("#similarity .number")).to_have_text("1.00")
    ready(page)


def test_the_keyboard_alone_is_enough(visit: Open, address: str) -> None:
    page = visit(address)
    expect(page.locator("#caveat")).not_to_be_empty()
    seen = []
    for _ in range(30):
        page.keyboard.press("Tab")
        name, shown = page.evaluate(
            """() => {
                const element = document.activeElement;
                const around = element.closest(".drop") ?? element;
                const name = element.getAttribute("aria-label") ?? element.labels?.[0]?.innerText ?? element.innerText;
                const outline = [element, around].some((e) => parseFloat(getComputedStyle(e).outlineWidth) >= 2
                    && getComputedStyle(e).outlineStyle !== "none");
                return [name.trim(), outline];
            }"""
        )
        if name == "Try the drawing of an airplane":
            page.keyboard.press("Enter")
        if page.evaluate("document.activeElement === document.body"):
            break
        assert name
        assert shown, f"{name}: its focus can't be seen"
        seen.append(name)
    assert "Try the drawing of an airplane" in seen
    assert "Choose the second picture" in seen
    expect(page.locator("#classes .bars li")).to_have_count(5)
    ready(page)


@pytest.mark.parametrize("size", [DESK, PHONE, SMALL], ids=["desk", "phone", "small"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off(
    visit: Open, address: str, size: tuple[int, int], scheme: str, tmp_path: Path
) -> None:
    page = visit(address, size, scheme, motion="reduce")
    photo = tmp_path / "IMG_20241125_123456789_HDR_PORTRAIT_as_phones_name_their_photos.jpg"
    photo.write_bytes((SCENES / "ship.jpg").read_bytes())
    choose(page, photo)
    page.get_by_label("Compare with the drawing of a car").click()
    expect(page.locator("#similarity .number")).not_to_be_empty()
    for summary in page.locator("summary").all():
        summary.click()
    ready(page)
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = np.mean([int(n) for n in re.findall(r"\d+", ground)]) > 128
    assert light == (scheme == "light")
    assert page.evaluate("getComputedStyle(document.querySelector('.track span')).transitionDuration") == "0s"


def test_a_key_is_asked_for(visit: Open, tmp_path: Path) -> None:
    key, row = new_key("guest")
    (tmp_path / "keys.toml").write_text(row)
    settings = Settings(model_repository=SHIPPED.parent, api_keys_file=tmp_path / "keys.toml")
    with served(settings, PATIENCE_S) as address:
        page = visit(f"http://{address}", allow="401")
        dialog = page.locator("#key-dialog")
        expect(dialog).to_be_visible()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("not known")
        page.fill("#key", key)
        page.keyboard.press("Enter")
        expect(page.locator("#caveat")).not_to_be_empty()
        choose(page, SCENES / "ship.jpg")
        expect(page.locator("#classes .done code")).to_contain_text("Bearer $PRG_API_KEY")
        assert key not in page.content()
        assert page.evaluate("sessionStorage.getItem('prg-key')") == key
        assert page.evaluate("localStorage.length") == 0
        ready(page)


def test_the_openapi_page(visit: Open, address: str) -> None:
    page = visit(f"{address}/docs")
    page.locator("#operations-Images-classify_classify_post").get_by_role("button").first.click()
    expect(page.get_by_text("The most probable classes of each image")).to_be_visible()
    live = page.locator("#operations-Operations-live_health_live_get")
    live.get_by_role("button").first.click()
    live.get_by_role("button", name="Try it out").click()
    live.get_by_role("button", name="Execute").click()
    expect(live.get_by_text('"status": "live"').first).to_be_visible()
