"""A comparison as one HTML page: the grid of a run as a table, everything else as cards. Styles are in it, pictures beside it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from .pair import FAILED, PASSED, Comparison, Pair
from .pictures import GAIN

STYLE = """
:root { color-scheme: light dark; --ink: #1b1c1f; --dim: #63666d; --paper: #f7f6f3; --card: #fff; --line: #e2dfd8;
  --good: #1d7a46; --bad: #b3261e; --skip: #8a6100; --accent: #b8431b; }
@media (prefers-color-scheme: dark) { :root { --ink: #ecebe8; --dim: #a09f9b; --paper: #141516; --card: #1d1f21;
  --line: #34373a; --good: #6fcf97; --bad: #ff8a80; --skip: #e0b34d; --accent: #ff8a5c; } }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
main { max-width: 1400px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -.02em; } h1 b { color: var(--accent); }
h2 { margin: 2rem 0 .8rem; font-size: 1.15rem; }
p { margin: .3rem 0; } p.facts, p.notes { color: var(--dim); overflow-wrap: anywhere; }
.verdict { display: flex; flex-wrap: wrap; gap: .6rem 1.6rem; align-items: baseline; margin: 1.4rem 0 .6rem;
  padding: 1rem 1.2rem; background: var(--card); border: 1px solid var(--line); border-left: 6px solid var(--skip);
  border-radius: 10px; } .verdict.passed { border-left-color: var(--good); } .verdict.failed { border-left-color: var(--bad); }
.verdict strong { font-size: 1.2rem; } .verdict span { color: var(--dim); font-variant-numeric: tabular-nums; }
.passed strong, .state.passed { color: var(--good); } .failed strong, .state.failed { color: var(--bad); }
.state { font-size: .8rem; font-weight: 600; color: var(--skip); }
.scroll { overflow-x: auto; overflow-y: hidden; }
table { border-collapse: separate; border-spacing: 0; }
th, td { padding: 0 .8rem .8rem 0; } th { padding-top: .1rem; } td:last-child { padding-right: 0; }
th { font-weight: 600; color: var(--dim); text-align: left; white-space: nowrap; vertical-align: top; }
td { vertical-align: top; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1rem; }
article { min-width: 270px; padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
article.failed { border-color: var(--bad); } article header { display: flex; justify-content: space-between; gap: .6rem; }
article h3 { margin: 0; font-size: .9rem; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem; margin: .6rem 0 .5rem; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .72rem; color: var(--dim); white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
figure a { display: block; position: relative; } img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  border-radius: 6px; background: var(--paper); }
.flip img + img { position: absolute; inset: 0; opacity: 0; } .flip:hover img + img, .flip:focus-within img + img { opacity: 1; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .8rem; margin: 0; font-size: .82rem;
  font-variant-numeric: tabular-nums; } dt { color: var(--dim); } dd { margin: 0; }
ul { margin: .4rem 0 0; padding-left: 1.1rem; font-size: .82rem; } .failed li { color: var(--bad); }
"""
AXES = ("seed", "weight", "controlnet_strength")
CALLED = {"seed": "seed", "weight": "weight", "controlnet_strength": "ControlNet strength"}


@dataclass(frozen=True)
class Files:
    """Pictures of a pair, relative to the page; empty where there is none."""

    a: str = ""
    b: str = ""
    difference: str = ""

    def as_data(self) -> dict[str, str]:
        return {name: path for name, path in vars(self).items() if path}


def page(comparison: Comparison, files: Sequence[Files], facts: Mapping[str, str]) -> str:
    """The page of `comparison`, whose pictures are `files`, pair by pair."""
    state = "passed" if comparison.passed else "failed" if comparison.count(FAILED) else ""
    said = " · ".join(f"{_text(name)} {_text(value)}" for name, value in facts.items() if value)
    numbers = [f"{comparison.count(PASSED)} of {len(comparison.pairs)} pairs passed", comparison.thresholds.describe()]
    if comparison.least_ssim is not None:
        numbers.append(f"lowest SSIM {comparison.least_ssim:.4f}")
    if comparison.least_cosine is not None:
        numbers.append(f"lowest face cosine {comparison.least_cosine:.4f}")
    spans = "".join(f"<span>{_text(number)}</span>" for number in numbers)
    notes = "".join(f'<p class="notes">{_text(note)}</p>' for note in comparison.notes)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Hotpath comparison</title>
<style>{STYLE}</style>
<main>
<h1><b>Hotpath</b> comparison</h1>
<p class="facts">A: {_text(comparison.label_a)}<br>B: {_text(comparison.label_b)}<br>{said}</p>
<div class="verdict {state}"><strong>{"Passed" if comparison.passed else "Not passed"}</strong>{spans}</div>
{notes}
<p class="notes">Hold the pointer over A to see B in its place.</p>
{_body(comparison, files)}
</main>
</html>
"""


def _body(comparison: Comparison, files: Sequence[Files]) -> str:
    cells = [(pair, _card(pair, file, comparison)) for pair, file in zip(comparison.pairs, files, strict=True)]
    axes = [axis for axis in AXES if len({pair.at.get(axis) for pair, _ in cells}) > 1]
    if not axes:
        return f'<div class="cards">{"".join(card for _, card in cells)}</div>'
    # Seeds go down; what varies beside them goes across, and a third axis makes a section each.
    down = axes[0]
    across = axes[1] if len(axes) > 1 else None
    section = axes[2] if len(axes) > 2 else None
    parts = []
    for value in _values(cells, section):
        inside = [cell for cell in cells if section is None or cell[0].at.get(section) == value]
        if section is not None:
            parts.append(f"<h2>{_text(_named(section, value))}</h2>")
        parts.append(_table(inside, down, across))
    return "\n".join(parts)


def _table(cells: list[tuple[Pair, str]], down: str, across: str | None) -> str:
    columns = _values(cells, across)
    head = "".join(f"<th>{_text(_named(across, value))}</th>" for value in columns) if across else ""
    rows = []
    for row in _values(cells, down):
        inside = [cell for cell in cells if cell[0].at.get(down) == row]
        fields = "".join(
            f"<td>{''.join(card for pair, card in inside if across is None or pair.at.get(across) == column)}</td>"
            for column in columns
        )
        rows.append(f"<tr><th>{_text(_named(down, row))}</th>{fields}</tr>")
    heading = f"<tr><th></th>{head}</tr>" if across else ""
    return f'<div class="scroll"><table>{heading}{"".join(rows)}</table></div>'


def _values(cells: list[tuple[Pair, str]], axis: str | None) -> list[float | None]:
    return [None] if axis is None else list(dict.fromkeys(pair.at.get(axis) for pair, _ in cells))


def _named(axis: str, value: float | None) -> str:
    return f"{CALLED[axis]} {value:g}" if value is not None and abs(value) < 1e6 else f"{CALLED[axis]} {value}"


def _card(pair: Pair, files: Files, comparison: Comparison) -> str:
    state = pair.state if pair.state in (PASSED, FAILED) else ""
    remarks = "".join(f"<li>{_text(remark)}</li>" for remark in pair.remarks())
    figures = []
    if files.a and files.b and pair.measures is not None:
        both = _image(files.a, f"A: {comparison.label_a}") + _image(files.b, f"B: {comparison.label_b}")
        figures.append(
            f'<figure class="flip"><a href="{_address(files.a)}">{both}</a><figcaption>A</figcaption></figure>'
        )
    elif files.a:
        figures.append(_figure(files.a, "A"))
    if files.b:
        figures.append(_figure(files.b, "B"))
    if files.difference:
        figures.append(_figure(files.difference, f"difference x{GAIN}"))
    return f"""<article class="{state}"><header><h3>{_text(pair.name)}</h3><span class="state {state}">{_text(pair.state)}</span>
</header><div class="pictures">{"".join(figures)}</div>{_numbers(pair)}{f"<ul>{remarks}</ul>" if remarks else ""}</article>"""


def _numbers(pair: Pair) -> str:
    if pair.measures is None:
        return ""
    m = pair.measures
    rows = [("SSIM", f"{m.ssim:.4f}"), ("PSNR", "identical" if m.identical else f"{m.psnr:.1f} dB")]
    rows.append(("difference", f"mean {m.mean_difference * 255:.2f}, largest {m.max_difference * 255:.0f} of 255"))
    if pair.lpips is not None:
        rows.append(("LPIPS", f"{pair.lpips:.4f}"))
    if pair.faces is not None:
        cosines = ", ".join(f"{c:.4f}" for c in pair.faces.cosines)
        found = pair.faces.in_a or pair.faces.in_b
        rows.append(("face cosine", cosines or ("-" if found else "no face in either")))
    return "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in rows) + "</dl>"


def _figure(path: str, caption: str) -> str:
    return f'<figure><a href="{_address(path)}">{_image(path, caption)}</a><figcaption>{_text(caption)}</figcaption></figure>'


def _image(path: str, alt: str) -> str:
    return f'<img src="{_address(path)}" alt="{_text(alt)}" loading="lazy">'


def _address(path: str) -> str:
    return html.escape(quote(path), quote=True)


def _text(value: str) -> str:
    return html.escape(value, quote=True)
