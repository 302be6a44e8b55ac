"""A headless Chromium, and what it finds in a page; nothing here knows the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# (text, contrast) of every element with text of its own that is seen. A canvas turns colours of any
# notation into bytes; what is behind a text is blended from the page up, opacity included.
CONTRASTS = """
const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
const pen = canvas.getContext("2d", { willReadFrequently: true });
function blend(colors) {
  pen.globalAlpha = 1;
  pen.clearRect(0, 0, 1, 1);
  for (const [color, alpha] of colors) {
    pen.globalAlpha = alpha;
    pen.fillStyle = color;
    pen.fillRect(0, 0, 1, 1);
  }
  return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function luminance(bytes) {
  const [r, g, b] = bytes
    .map((byte) => byte / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim());
  if (!own.join("") || !element.checkVisibility() || element.closest("script")) continue;
  const line = [];
  for (let at = element; at; at = at.parentElement) line.unshift(getComputedStyle(at));
  const alpha = line.reduce((product, style) => product * style.opacity, 1);
  const behind = line.map((style) => [style.backgroundColor, 1]);
  const [front, back] = [blend([...behind, [line.at(-1).color, alpha]]), blend(behind)];
  const [dark, light] = [luminance(front), luminance(back)].sort((a, b) => a - b);
  found.push([own.join(" ").slice(0, 60), (light + 0.05) / (dark + 0.05)]);
}
return found;
"""


def why_not() -> str:
    """Why no browser can be driven here; nothing where it can."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (make env installs it)"
    if not _chromium():
        return "there is no chromium here (Debian: the package chromium)"
    if not shutil.which("chromedriver"):
        return "there is no chromedriver here (Debian: the package chromium-driver)"
    return ""


def _chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A driver of a fresh browser that notes what it logs and what it asks the network for."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = _chromium() or ""
    for switch in (*SWITCHES, f"--user-data-dir={profile}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = Service(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def complaints(driver: Any) -> list[str]:
    """What the console said since the last call."""
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver: Any) -> list[str]:
    """Addresses that were asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]


def set_width(driver: Any, width: int) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )


def set_scheme(driver: Any, scheme: str) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
