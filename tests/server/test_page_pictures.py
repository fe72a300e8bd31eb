"""Pictures of the page's views, compared with those in `pictures/`, which somebody has looked at.

`PICTURES=write pytest tests/server/test_page_pictures.py` takes them anew. They hold for the font that they were taken
with: another one moves every line, so where there is another the tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.server.test_page_browser import CHROMIUM, chunk, scripted, send, stream
from tests.support.http_server import listening
from tests.support.paths import ROOT

playwright = pytest.importorskip("playwright.sync_api")

FOLDER = ROOT / "tests" / "server" / "pictures"
FONT = "DejaVu Sans"
WRITE = os.environ.get("PICTURES") == "write"


def font() -> str:
    if shutil.which("fc-match") is None:
        return "none"
    return subprocess.run(["fc-match", "system-ui", "family"], capture_output=True, text=True).stdout.strip()


pytestmark = [
    pytest.mark.browser,
    pytest.mark.process,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: apt install chromium"),
    pytest.mark.skipif(font() != FONT, reason=f"the pictures were taken with {FONT}, which is not the font here"),
    pytest.mark.xdist_group("browser"),
]
SIZES = {"wide": (1440, 900), "phone": (360, 720)}
TOKENS = ("The", " sea", " is", " salty", ",", " because", " rivers", " bring", " it", " salt", ".")
DRAFTERS = (None, "ngram", "ngram", None, None, "suffix", "suffix", "suffix", None, "eagle3", None)
LIVE = {
    "state": "ready", "seconds": 0.5, "in_flight": 3, "running": 2, "waiting": 1, "max_num_seqs": 32,
    "blocks_total": 400, "blocks_used": 90, "blocks_cached": 120, "steps": 20, "rows": 70, "prompt_tokens": 12,
    "generated_tokens": 40, "prefix_queried_tokens": 100, "prefix_hit_tokens": 64, "preemptions": 1,
    "tokens": {"ngram": 30, "none": 10},
    "chosen": {"ngram": 30, "none": 10}, "drafted_at": {"ngram": [20, 10, 5]}, "accepted_at": {"ngram": [15, 5, 1]},
    "predicted_goodput": 90.0, "predicted_plain_goodput": 45.0,
    "phases": {"draft": 0.01, "forward": 0.4, "sample": 0.03},
}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--font-render-hinting=none"])
        yield made
        made.close()


def answer(route: Any) -> None:
    """The same answer to all, drafted where the request asks for it."""
    plain = json.loads(route.request.post_data).get("speculation") == "off"
    drafters = [None] * len(TOKENS) if plain else DRAFTERS
    origins = [
        {"token": token, "drafter": drafter, "position": drafter and 1}
        for token, drafter in zip(TOKENS, drafters, strict=True)
    ]
    time.sleep(0.3)  # what else was asked for has come by then
    timings = {
        "tokens_per_second": 40.0 if plain else 64.0,
        "accepted_tokens": sum(each is not None for each in drafters),
    }
    chunks = [chunk({"content": token}, provenance=[origin]) for token, origin in zip(TOKENS, origins, strict=True)]
    route.fulfill(**stream(*chunks, chunk({}, "stop", timings=timings, usage={"completion_tokens": len(TOKENS)})))


def chat(page: Any) -> None:
    page.get_by_label("Colour tokens by drafter").check()
    send(page, "Why is the sea salty?")
    page.get_by_role("button", name="Regenerate").wait_for()


def race(page: Any) -> None:
    page.get_by_role("link", name="Race").click()
    page.get_by_role("button", name="Race").click()
    page.get_by_text("The texts are the same").wait_for()


def engine(page: Any) -> None:
    page.get_by_role("link", name="Engine").click()
    page.get_by_text("blocks used").wait_for()


VIEWS = {"chat": chat, "race": race, "engine": engine}


@pytest.mark.parametrize(("view", "size", "scheme"), [
    ("chat", "wide", "light"), ("chat", "phone", "dark"), ("race", "wide", "dark"), ("race", "phone", "light"),
    ("engine", "wide", "light"),
])  # fmt: skip
def test_a_view_looks_as_it_did(browser: Any, view: str, size: str, scheme: str) -> None:
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
    )
    with listening(scripted([5])) as url:
        page = context.new_page()
        page.set_default_timeout(20_000)
        asked: list[Any] = []

        def live(route: Any) -> None:
            asked.append(route)
            if len(asked) == 1:  # the next one waits for ever
                route.fulfill(**stream(*(LIVE | {"generated_tokens": 20 + 3 * (i % 7)} for i in range(30))))

        page.route("**/page/live", live)
        page.route("**/v1/chat/completions", answer)
        page.goto(url)
        page.get_by_label("Message").wait_for()
        VIEWS[view](page)
        page.evaluate("document.activeElement.blur()")
        taken = page.screenshot(mask=[page.locator(".model")], animations="disabled")
    context.close()
    path = FOLDER / f"{view}-{size}-{scheme}.png"
    if WRITE:
        Image.open(BytesIO(taken)).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(path, optimize=True)
    share = differing(Image.open(BytesIO(taken)), Image.open(path))
    if share > 0.002:
        (FOLDER / f"{path.stem}.new.png").write_bytes(taken)
    assert share <= 0.002, f"{share:.1%} of {path.name} differs: see {path.stem}.new.png beside it"


def differing(one: Image.Image, other: Image.Image) -> float:
    """The share of squares of 8 pixels in which a colour differs, on average over the square, by more than 16 of 255:
    more than another rasterizer's edges, less than a letter."""
    if one.size != other.size:
        return 1.0
    first, second = (np.asarray(each.convert("RGB"), np.float32) for each in (one, other))
    height, width = (8 * (length // 8) for length in first.shape[:2])
    gap = (first - second)[:height, :width].reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3))
    return float((np.abs(gap).max(-1) > 16).mean())
