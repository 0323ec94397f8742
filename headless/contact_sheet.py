"""One HTML page with everything a demo run made: pictures, what went in, reports, and where the time went."""

from __future__ import annotations

import html
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import torch

from .. import __version__
from .outcome import Outcome, OutputFile

if TYPE_CHECKING:
    from .demo import DemoResult

STYLE = """
:root { color-scheme: light dark; --ink: #1b1c1f; --dim: #63666d; --paper: #f7f6f3; --card: #fff; --line: #e2dfd8;
  --good: #1d7a46; --bad: #b3261e; --skip: #8a6100; --accent: #b8431b; }
@media (prefers-color-scheme: dark) { :root { --ink: #ecebe8; --dim: #a09f9b; --paper: #141516; --card: #1d1f21;
  --line: #34373a; --good: #6fcf97; --bad: #ff8a80; --skip: #e0b34d; --accent: #ff8a5c; } }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -.02em; } h1 b { color: var(--accent); }
h2 { margin: 0; font-size: 1.15rem; }
p.facts { margin: .3rem 0 1.8rem; color: var(--dim); }
a { color: var(--accent); }
table { width: 100%; border-collapse: collapse; font-size: .92rem; }
th { text-align: left; font-weight: 600; color: var(--dim); }
th, td { padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.scroll { overflow-x: auto; }
section { margin-top: 1.4rem; padding: 1.2rem 1.3rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
header { display: flex; gap: .8rem; align-items: baseline; flex-wrap: wrap; }
.state { font-size: .8rem; font-weight: 600; } .done { color: var(--good); } .failed { color: var(--bad); }
.skipped { color: var(--skip); } .time { margin-left: auto; color: var(--dim); font-size: .85rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: .9rem; margin-top: 1rem; }
figure { margin: 0; } figure a { display: block; }
figure img, figure video { width: 100%; height: 210px; object-fit: contain; border-radius: 8px; background: var(--paper);
  border: 1px solid var(--line); }
figcaption { margin-top: .25rem; font-size: .8rem; color: var(--dim); overflow-wrap: anywhere; }
pre { margin: .9rem 0 0; padding: .7rem .9rem; font-size: .82rem; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--paper); border-radius: 8px; }
details { margin-top: .9rem; font-size: .9rem; } summary { cursor: pointer; color: var(--dim); }
"""


@dataclass(frozen=True)
class Sheet:
    """What the page shows. started: seconds since 1970."""

    where: str
    started: float
    results: Sequence[DemoResult]


def write_sheet(folder: Path, sheet: Sheet) -> Path:
    """Write `folder`/index.html; pictures are linked by relative paths, everything else is in the page."""
    path = folder / "index.html"
    path.write_text(page(folder, sheet), encoding="utf-8")
    return path


def page(folder: Path, sheet: Sheet) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    facts = (
        f"Hotpath {__version__}, {sheet.where}, torch {torch.__version__}, {device}, Python "
        f"{platform.python_version()}, {time.strftime('%Y-%m-%d %H:%M', time.localtime(sheet.started))}"
    )
    rows = "\n".join(_row(result) for result in sheet.results)
    cards = "\n".join(_card(folder, result) for result in sheet.results)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Hotpath demo</title>
<style>{STYLE}</style>
<main>
<h1><b>Hotpath</b> demo</h1>
<p class="facts">{_text(facts)}. The models are small ones made for this demo: they show that everything works, not how
good pictures get.</p>
<div class="scroll"><table>
<tr><th>Workflow</th><th>State</th><th>Where</th><th>Time</th><th>Engine and report</th></tr>
{rows}
</table></div>
{cards}
</main>
</html>
"""


def _row(result: DemoResult) -> str:
    outcome = result.outcome
    said = result.reason or outcome.report() or "-"
    seconds = f"{outcome.seconds:.2f} s" if result.state == "done" else "-"
    return (
        f'<tr><td><a href="#{_text(result.name)}">{_text(result.name)}</a></td>'
        f'<td class="{result.state}">{result.state}</td><td>{_text(outcome.where)}</td>'
        f'<td class="number">{seconds}</td><td>{_text(said)}</td></tr>'
    )


def _card(folder: Path, result: DemoResult) -> str:
    outcome = result.outcome
    figures = [_figure(folder, path, "input") for path in result.inputs]
    figures += [_figure(folder, file.path, _caption(file)) for file in outcome.files]
    texts = "".join(f"<pre>{_text(f'{node.title or node.class_type}: {text}')}</pre>" for node, text in outcome.texts)
    reason = f"<pre>{_text(result.reason)}</pre>" if result.reason else ""
    time_taken = (
        f'<span class="time">{outcome.seconds:.2f} s, {_text(outcome.where)}</span>' if result.state == "done" else ""
    )
    heading = _text(result.name.replace("_", " "))
    pictures = f'<div class="pictures">{"".join(figures)}</div>' if figures else ""
    return f"""<section id="{_text(result.name)}">
<header><h2>{heading}</h2><span class="state {result.state}">{result.state}</span>{time_taken}</header>
{pictures}{texts}{reason}
{_times(outcome)}</section>"""


def _figure(folder: Path, path: Path, caption: str) -> str:
    address = quote(Path(os.path.relpath(path, folder)).as_posix())
    kind = OutputFile.kind_of(path)
    if kind == "image":
        shown = f'<a href="{address}"><img src="{address}" alt="{_text(caption)}" loading="lazy"></a>'
    elif kind == "video":
        shown = f'<video src="{address}" controls loop muted preload="metadata"></video>'
    else:
        shown = f'<a href="{address}">{_text(path.name)}</a>'
    return f"<figure>{shown}<figcaption>{_text(caption)}</figcaption></figure>"


def _caption(file: OutputFile) -> str:
    return f"{file.node.title or file.node.class_type}: {file.path.name}"


def _times(outcome: Outcome) -> str:
    if not outcome.times:
        return ""
    rows = "".join(
        f'<tr><td>{_text(t.node.title or t.node.class_type)}</td><td class="number">'
        f"{'unchanged' if t.seconds is None else f'{t.seconds * 1000:.0f} ms'}</td></tr>"
        for t in outcome.times
    )
    return f"<details><summary>Time by node</summary><table>{rows}</table></details>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
