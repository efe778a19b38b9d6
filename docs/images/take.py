"""Takes the playground's screenshots beside this file: python docs/images/take.py [address of a service]."""

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
SIZES = {"desktop": (1120, 900), "phone": (360, 780)}


def main(argv: list[str]) -> int:
    """One picture a width and colour scheme, of the whole page."""
    address = argv[0] if argv else "http://127.0.0.1:8000"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        for size, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
                )
                page.goto(address)
                page.get_by_label("Try the drawing of a ship").click()
                page.get_by_label("Compare with the drawing of a car").click()
                page.wait_for_selector("#similarity .number:not(:empty)")
                page.wait_for_selector("[aria-busy]", state="detached")
                shot = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
                few = shot.quantize(256, dither=Image.Dither.NONE)
                few.save(HERE / f"playground-{size}-{scheme}.png", optimize=True)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
