"""Everything that is worth measuring on one graphics card, in one command, within a given time.

    python benchmarks/card.py --minutes 9 --out card            # health, kernels, GPU tests, then the benchmarks, reduced
    python benchmarks/card.py --minutes 9 --out card --resume   # what the last call did not get to
    python benchmarks/card.py --only instantid faces --out card
    python benchmarks/card.py --together --minutes 6 --out card     # get ready side by side, measure one at a time
    python benchmarks/card.py --tiny --out card                 # a test of itself on any machine; so it runs without CUDA
    python benchmarks/card.py --simulated --minutes 60 --out card   # the same by way of the branches for CUDA

The stages stand in `card_plan.py`, the most telling first. Each is a process of its own with a limit of its own: one that
crashes, hangs or runs out of memory is noted, and the next begins. After every stage DIR holds what is known so far:
`card.json` (all results, also read by --resume), `card.md` (tables fit for RESULTS.md, last the goals beside what was
measured) and `card.log` (what every stage printed). A second call first does what was not begun, then what failed.

With --together all stages begin at once, and whoever measures stops the others meanwhile (see `quiet.py`). It needs a
processor with a core for each, memory for all models at once (about 100 GB of the card's, 64 of the host's), and the warm-up
times that are reported are those of stages beside one another.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import card_plan
import quiet
from card_plan import Stage

ROOT = Path(__file__).resolve().parent.parent
SIMULATED = ROOT / "tests" / "support" / "simulated_card" / "at_start"  # a module in it is what Python runs first
LOG_BYTES = 1 << 20  # of one stage: its end
GRACE = 8  # seconds between being asked to stop and being stopped
SCRATCH_BYTES = 48 << 30  # the random checkpoints are up to 30 GB
DONE, FAILED, STOPPED = "done", "failed", "stopped"


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Of every stage: no network is asked, and temporary files are in memory where there is room for them."""
    made = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if options.comfyui is not None:
        made["COMFYUI_PATH"] = str(options.comfyui.resolve())
    if options.peers is not None:
        made["HOTPATH_PEERS"] = str(options.peers.resolve())
    if options.simulated:
        made["HOTPATH_SIMULATED_CARD"] = "1"
        made["PYTHONPATH"] = os.pathsep.join([str(SIMULATED), *filter(None, [made.get("PYTHONPATH")])])
    memory = Path("/dev/shm")
    if "TMPDIR" not in os.environ and memory.is_dir() and shutil.disk_usage(memory).free > SCRATCH_BYTES:
        made["TMPDIR"] = str(memory)
    return made


class Running:
    """One stage's process. What it prints goes to `log`."""

    def __init__(self, stage: Stage, command: Sequence[str], env: Mapping[str, str], limit: float, log: Path) -> None:
        apart: dict[str, Any] = (
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
        )
        self.stage, self.command, self.limit, self.log = stage, command, limit, log
        self.start, self.began = time.monotonic(), time.time()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=dict(env), cwd=ROOT, **apart
            )

    def over(self) -> bool:
        return self.process.poll() is not None or time.monotonic() > self.start + self.limit

    def wait(self) -> None:
        """Until it ends or its time is up."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, self.start + self.limit - time.monotonic()))

    def end(self) -> dict[str, Any]:
        """Status, seconds and last line; nothing of the stage is left on the card."""
        code = self.process.poll()
        seconds = time.monotonic() - self.start
        _end(self.process)
        lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        last = lines[-1].strip()[:300] if lines else "it printed nothing"
        if code is None:
            return {
                "status": STOPPED,
                "seconds": seconds,
                "why": f"its {self.limit:.0f} s were over; last line: {last}",
            }
        if code:
            ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
            return {"status": FAILED, "seconds": seconds, "why": f"{ended}: {last}"}
        return {"status": DONE, "seconds": seconds, "why": ""}


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and everything it started: asked first, so that it can write what it has."""
    for ask, patience in ((signal.SIGINT, GRACE), (getattr(signal, "SIGKILL", signal.SIGTERM), None)):
        try:
            if os.name == "nt":
                process.terminate()
            else:
                os.killpg(process.pid, ask)
        except (ProcessLookupError, PermissionError):
            break  # nothing of it is left
        if process.returncode is not None:
            continue  # only children that outlived it: no need to wait for them
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def order(stages: Sequence[Stage], state: Mapping[str, Any]) -> list[Stage]:
    """What is left to do: what was never begun, then what did not end well."""
    status = {name: found["status"] for name, found in state.get("stages", {}).items()}
    never = [stage for stage in stages if stage.name not in status]
    return never + [stage for stage in stages if status.get(stage.name, DONE) != DONE]


def remember(state: dict[str, Any], stages: Sequence[Stage], out: Path) -> None:
    """card.json and card.md, each whole at every moment."""
    texts = {"card.json": json.dumps(state, indent=1), "card.md": report(state, stages)}
    for name, text in texts.items():
        written = out / f"{name}.new"
        written.write_text(text + "\n", encoding="utf-8")
        written.replace(out / name)


def report(state: Mapping[str, Any], stages: Sequence[Stage]) -> str:
    found = state["stages"]
    parts = [f"# One card, measured\n\n{state['started']}, `python benchmarks/card.py {state['arguments']}`"]
    for stage in stages:
        ran = found.get(stage.name)
        if ran is None:
            continue
        head = f"## {stage.title}\n\n{ran['status']} after {ran['seconds']:.0f} s. {ran['why']}".rstrip()
        table = ran.get("table") or ("" if ran["results"] is None else card_plan.table(ran["results"]))
        parts.append(f"{head}\n\n`{ran['command']}`\n\n{table}".rstrip())
    rows = ["| stage | status | seconds | |", "|---|---|---|---|"]
    for stage in stages:
        ran = found.get(stage.name, {"status": "not begun", "seconds": 0.0, "why": ""})
        why = ran["why"].replace("|", "/")
        rows.append(f"| {stage.title} | {ran['status']} | {ran['seconds']:.0f} | {why} |")
    parts.append("## Stages\n\n" + "\n".join(rows))
    parts.append("## Goals\n\n" + card_plan.goal_table({name: ran["results"] for name, ran in found.items()}))
    return "\n\n".join(parts)


def results_of(stage: Stage, work: Path, began: float) -> Any:
    """What the stage left in its file; None where there is none that can be read."""
    file = work / f"{stage.name}.json"
    try:
        return json.loads(file.read_text("utf-8")) if file.stat().st_mtime >= began - 1 else None
    except (OSError, ValueError):
        return None


def printed_tables(log: Path) -> str:
    """A stage's own report: from its first heading to the end of what it printed."""
    lines = log.read_text("utf-8", "replace").splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("## ")), None)
    return "" if first is None else "\n".join(lines[first:]).replace("\n## ", "\n### ").replace("## ", "### ", 1)


def short(command: Sequence[str], work: Path) -> str:
    """The command as somebody else would type it."""
    parts = ["python" if part == sys.executable else part for part in command]
    return " ".join(part.replace(str(work), "DIR").replace(f"{ROOT}{os.sep}", "") for part in parts)


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole call; nothing runs longer")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of card.json, card.md, card.log")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages, in the plan's order")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STAGE")
    parser.add_argument(
        "--resume", nargs="?", type=Path, const=Path(), metavar="FILE", help="go on from FILE, else from DIR/card.json"
    )
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder, where it is not found by itself")
    parser.add_argument("--peers", type=Path, help="folder with checkouts of the packs to compare with")
    parser.add_argument(
        "--together",
        action="store_true",
        help="stages get ready side by side and measure one at a time; not on Windows",
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes: a test of this script; implied without CUDA")
    parser.add_argument(
        "--simulated",
        action="store_true",
        help="small sizes on a card that tests/support simulates: no figure means anything",
    )
    parser.add_argument("--list", action="store_true", help="say which stages there are, and end")
    options = parser.parse_args()
    if options.out is None and not options.list:
        parser.error("--out DIR says where the results go")
    return options


def has_cuda() -> bool:
    """Asked in another process: this one holds no memory of the card."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Call:
    """The stages of one call and what becomes known of them."""

    def __init__(
        self,
        options: argparse.Namespace,
        state: dict[str, Any],
        stages: Sequence[Stage],
        work: Path,
        until: float,
        tiny: bool,
    ) -> None:
        self.options, self.state, self.stages, self.work, self.until, self.tiny = (
            options,
            state,
            stages,
            work,
            until,
            tiny,
        )
        self.env = environment(options)

    def one_by_one(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            running = self.begin(stage, self.env, 600 if self.tiny else stage.seconds)
            if running is None:
                continue
            try:
                running.wait()
            finally:  # also when this program is interrupted
                ran = running.end()
            self.note(running, ran)

    def side_by_side(self, stages: Sequence[Stage]) -> None:
        """All at once, each with folders of its own for what compilers keep: a stopped one may hold their locks."""
        known = self.work / "together"
        known.mkdir()
        kept = Path(os.environ.get("HOTPATH_COMPILED", self.work / "compiled"))
        left: list[Running] = []
        try:
            for stage in stages:
                own = {
                    "TORCHINDUCTOR_CACHE_DIR": str(kept / stage.name / "inductor"),
                    "TRITON_CACHE_DIR": str(kept / stage.name / "triton"),
                }
                running = self.begin(stage, {**self.env, quiet.FOLDER: str(known), **own}, float("inf"), 0.2)
                if running is not None:
                    quiet.announce(known, stage.name, running.process.pid)
                    left.append(running)
            while left:
                time.sleep(0.1)
                for running in [running for running in left if running.over()]:
                    left.remove(running)
                    self._leave(known, running)
        finally:
            for running in left:
                self._leave(known, running)

    def _leave(self, known: Path, running: Running) -> None:
        quiet.withdraw(known, running.stage.name)
        if running.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGCONT)  # stopped, it could not hear that it shall end
        ran = running.end()
        if ran["status"] != DONE:
            quiet.wake(known)  # it may have been measuring
        self.note(running, ran)

    def begin(self, stage: Stage, env: Mapping[str, str], most: float, queue: float = 0.0) -> Running | None:
        """The stage's process, which has `most` seconds at most; None where it cannot run, which is noted.

        queue: part of its time in which it may have to wait for its turn, and for which it must not plan.
        """
        left = self.until - time.monotonic() - GRACE - 2
        if left < (1 if self.tiny else stage.least):
            print(f"{stage.name}: no time, {left:.0f} s are left", flush=True)
            return None
        limit = min(left, most)
        command = stage.command(self.work, limit * (1 - queue), self.tiny, self.options.peers)
        missing = [name for name in stage.needs if importlib.util.find_spec(name) is None]
        if missing:
            why = {"status": FAILED, "seconds": 0.0, "why": f"not installed: {', '.join(missing)}"}
            self._note(stage, command, None, why, "")
            return None
        print(f"{stage.name}: at most {limit:.0f} s", flush=True)
        return Running(stage, command, env, limit, self.work / f"{stage.name}.log")

    def note(self, running: Running, ran: dict[str, Any]) -> None:
        results = results_of(running.stage, self.work, running.began)
        printed = printed_tables(running.log).replace(str(self.work), "DIR")
        self._note(running.stage, running.command, results, ran, printed)
        with (self.options.out / "card.log").open("ab") as all_logs:
            all_logs.write(f"\n===== {running.stage.name}: {short(running.command, self.work)}\n".encode())
            all_logs.write(running.log.read_bytes()[-LOG_BYTES:])

    def _note(self, stage: Stage, command: Sequence[str], results: Any, ran: dict[str, Any], printed: str) -> None:
        known = self.state["stages"]
        before = known.get(stage.name)
        if results is None and before is not None and before["results"] is not None:
            print(f"{stage.name}: {ran['status']}; the earlier results stay", flush=True)
            before["why"] = f"{before['why']} Again: {ran['status']}, {ran['why']}".strip()
        else:
            known[stage.name] = {
                **ran, "tiny": self.tiny, "command": short(command, self.work), "results": results, "table": printed,
            }  # fmt: skip
        remember(self.state, self.stages, self.options.out)
        print(f"{stage.name}: {ran['status']}, {ran['seconds']:.0f} s. {ran['why']}", flush=True)


def main(stages: Sequence[Stage] = card_plan.STAGES) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if "--list" in sys.argv:
        for stage in stages:
            print(f"{stage.name:22} {stage.seconds:4} s at most   {stage.title}")
        return 0
    options = arguments(parser)
    unknown = {*(options.only or ()), *options.skip} - {stage.name for stage in stages}
    if unknown:
        parser.error(f"there is no stage {', '.join(sorted(unknown))}; --list names them")
    until = start + 60 * options.minutes
    tiny = options.tiny or options.simulated or not has_cuda()
    options.out.mkdir(parents=True, exist_ok=True)
    given = " ".join("DIR" if os.sep in part else part for part in sys.argv[1:])  # a path says nothing about what ran
    state: dict[str, Any] = {"started": str(date.today()), "arguments": given, "stages": {}}
    if options.resume is not None:
        earlier = options.out / "card.json" if options.resume == Path() else options.resume
        try:
            state["stages"] = json.loads(earlier.read_text("utf-8"))["stages"]
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{earlier} cannot be gone on from: {error}")
    else:
        (options.out / "card.log").unlink(missing_ok=True)
    chosen = [s for s in stages if s.name not in options.skip and (not options.only or s.name in options.only)]
    with tempfile.TemporaryDirectory(prefix="hotpath_card") as scratch:
        call = Call(options, state, stages, Path(scratch), until, tiny)
        (call.side_by_side if options.together else call.one_by_one)(order(chosen, state))
    remember(state, stages, options.out)
    text = (options.out / "card.md").read_text("utf-8")
    print(text[text.index("## Stages") :])
    return 0


if __name__ == "__main__":
    sys.exit(main())
