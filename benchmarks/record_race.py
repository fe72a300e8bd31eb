"""Records a race between plain decoding and drafts as an animated SVG: the README's.

    pilotfish serve --model smollm2-135m
    python benchmarks/record_race.py --out docs/images/race.svg

Asks a running server for the same answer with each of --arm, one after the other, and draws the tokens at the times at
which they came, coloured by the drafter that proposed them (`include_provenance`). The picture needs nothing else, and
is a few tens of kilobytes. Answers that differ are refused.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

COLUMNS, CHARACTER, LINE = 44, 7.8, 19.0
WIDTH, MARGIN, TOP = 800, 16, 92
PAUSE = 4.0
"""Seconds for which the finished texts are shown."""
COLOURS = {"ngram": "#1d4f80", "suffix": "#22592a", "prediction": "#6b4a10", "grammar": "#5a3270"}
OTHERS = ("#753237", "#155555", "#57511a")


@dataclass
class Lane:
    arm: str
    tokens: list[tuple[float, str, str | None]] = field(default_factory=list)  # seconds since the first, text, drafter
    rate: float = 0.0

    @property
    def text(self) -> str:
        return "".join(text for _, text, _ in self.tokens)


def ask(url: str, arm: str, prompt: str, max_tokens: int) -> Lane:
    """Record an answer."""
    body = {
        "messages": [{"role": "user", "content": prompt}], "model": model_of(url), "temperature": 0, "seed": 1,
        "max_tokens": max_tokens, "speculation": arm, "stream": True, "include_provenance": True,
        "cache_salt": f"{arm} {time.time()}",  # else an arm could draft from the answer of the one before
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    lane, began = Lane(arm), 0.0
    with urllib.request.urlopen(request) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            now = time.perf_counter()
            for choice in chunk["choices"]:
                for origin in choice.get("provenance", ()):
                    began = began or now
                    lane.tokens.append((now - began, origin["token"], origin["drafter"]))
            lane.rate = (chunk.get("timings") or {}).get("tokens_per_second") or lane.rate
    return lane


def model_of(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models") as response:
        return str(json.load(response)["data"][0]["id"])


def placed(lane: Lane) -> list[tuple[float, int, int, str, str | None]]:
    """Return pieces of text as (seconds, line, column, text, drafter), broken at COLUMNS and at line breaks."""
    found, line, column = [], 0, 0
    for when, token, drafter in lane.tokens:
        for i, part in enumerate(token.split("\n")):
            if i:
                line, column = line + 1, 0
            if column + len(part) > COLUMNS and part.strip():
                line, column, part = line + 1, 0, part.lstrip()
            if part:
                found.append((when, line, column, part, drafter))
                column += len(part)
    return found


def svg(lanes: list[Lane], prompt: str, model: str) -> str:
    """Return the picture."""
    pieces = [placed(lane) for lane in lanes]
    rows = 1 + max(line for each in pieces for _, line, *_ in each)
    height = TOP + rows * LINE + 44
    total = PAUSE + max(lane.tokens[-1][0] for lane in lanes)
    times = sorted({when for each in pieces for when, *_ in each} | {lane.tokens[-1][0] for lane in lanes})
    names = {when: f"t{i}" for i, when in enumerate(times)}
    drafters = list(dict.fromkeys(drafter for lane in lanes for *_, drafter in lane.tokens if drafter))
    others = iter(OTHERS * len(drafters))
    colours = {name: COLOURS.get(name) or next(others) for name in drafters}
    style = [
        "text{font:13px ui-monospace,Menlo,Consolas,monospace;fill:#e4e8ec;white-space:pre}",
        ".dim{fill:#a3adb8}.head{font-weight:bold}",
        "@media (prefers-reduced-motion:reduce){g{animation:none!important;opacity:1!important}}",
    ]
    for when, name in names.items():
        share = 100 * when / total
        style.append(f"@keyframes {name}{{0%,{share:.2f}%{{opacity:0}}{share + 0.01:.2f}%,100%{{opacity:1}}}}")
        style.append(f".{name}{{opacity:0;animation:{name} {total:.2f}s linear infinite}}")
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="The same answer without drafts and with them">',
        f"<style>{''.join(style)}</style>",
        f'<rect width="{WIDTH}" height="{height:.0f}" rx="8" fill="#15181c"/>',
        f'<text x="{MARGIN}" y="28"><tspan class="dim">{escape(model)}: </tspan>{escape(prompt)}</text>',
    ]
    half = (WIDTH - 3 * MARGIN) / 2
    for i, (lane, own) in enumerate(zip(lanes, pieces, strict=True)):
        left = MARGIN + i * (half + MARGIN)
        title = (
            "plain decoding" if lane.arm == "off" else "with drafts" + (f" by {lane.arm}" if lane.arm != "auto" else "")
        )
        box = f'x="{left - 4}" y="44" width="{half + 8}" height="{height - 92:.0f}"'
        out.append(f'<rect {box} rx="6" fill="#1e2329" stroke="#39414a"/>')
        out.append(f'<text class="head" x="{left + 4}" y="66">{escape(title)}</text>')
        groups: dict[float, list[str]] = {}
        for when, line, column, text, drafter in own:
            x, y = left + 4 + column * CHARACTER, TOP + line * LINE
            length = f'textLength="{len(text) * CHARACTER:.1f}" lengthAdjust="spacingAndGlyphs"'
            drawn = ""
            if drafter:
                size = f'width="{len(text) * CHARACTER:.1f}" height="{LINE - 2:.0f}"'
                drawn = f'<rect x="{x:.1f}" y="{y - 13:.1f}" {size} rx="2" fill="{colours[drafter]}"/>'
            drawn += f'<text x="{x:.1f}" y="{y:.1f}" {length}>{escape(text)}</text>'
            groups.setdefault(when, []).append(drawn)
        out += [f'<g class="{names[when]}">{"".join(drawn)}</g>' for when, drawn in groups.items()]
        last = lane.tokens[-1][0]
        said = f"{lane.rate:.0f} tokens/s" + (f", {lane.rate / lanes[0].rate:.2f}×" if i else "")
        out.append(f'<g class="{names[last]}"><text class="dim" x="{left + half - 4}" y="66" ')
        out.append(f'text-anchor="end">{said}</text></g>')
    x = float(MARGIN)
    for name, colour in colours.items():
        out.append(f'<rect x="{x:.0f}" y="{height - 30:.0f}" width="12" height="12" rx="2" fill="{colour}"/>')
        out.append(f'<text class="dim" x="{x + 18:.0f}" y="{height - 19:.0f}">{escape(name)}</text>')
        x += 30 + len(name) * CHARACTER
    slowest = max(lane.tokens[-1][0] for lane in lanes)
    out.append(f'<g class="{names[slowest]}"><text class="head" x="{WIDTH - MARGIN}" y="{height - 19:.0f}" ')
    out.append('text-anchor="end">✓ the same text</text></g></svg>')
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--prompt", default="Write a Python class for a stack with push, pop and peek.")
    parser.add_argument("--max-tokens", type=int, default=110)
    parser.add_argument("--arm", action="append", help="a value of `speculation`; default: off, then auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    arms = args.arm or ["off", "auto"]
    for arm in arms:
        ask(args.url, arm, args.prompt, 8)  # reads the prompt, which is kept
    lanes = [ask(args.url, arm, args.prompt, args.max_tokens) for arm in arms]
    if len({lane.text for lane in lanes}) != 1:
        raise SystemExit("the texts differ: is another model or precision at work?")
    args.out.write_text(svg(lanes, args.prompt, model_of(args.url)))
    for lane in lanes:
        print(f"{lane.arm}: {len(lane.tokens)} tokens, {lane.rate:.1f} tokens/s")


if __name__ == "__main__":
    main()
