"""The runner of the benchmarks: what crashes or hangs is noted and the rest goes on; goals are held against results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import card
import card_plan
from card_plan import Goal, Stage

BENCHMARKS = Path(card.__file__).resolve().parent
WRITES = (
    "import json, sys; json.dump({'rows': [{'fps': 2.0}]}, open(sys.argv[1], 'w')); print('## Films'); print('| a |')"
)
CRASHES = "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
LACKS = "import a_module_that_is_nowhere"
# Writes what it knows, then hangs, with a child that hangs too and hears nothing.
HANGS = (
    "import json, subprocess, sys, time; json.dump({'rows': []}, open(sys.argv[1], 'w')); "
    "subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)']); "
    "time.sleep(60)"
)


class Script(Stage):
    """Runs its `tiny` as a program."""

    def command(self, work: Path, limit: float, tiny: bool, peers: Path | None) -> list[str]:
        return [sys.executable, "-c", self.tiny[0], str(work / f"{self.name}.json")]


def test_stages_are_listed_without_a_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["card.py", "--list"])
    assert card.main([stage("good", WRITES)]) == 0 and "good" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["card.py"])
    with pytest.raises(SystemExit):
        card.main([stage("good", WRITES)])


def stage(name: str, code: str, needs: tuple[str, ...] = ()) -> Stage:
    return Script(name, name.title(), (), (code,), 100, needs=needs)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(card, "GRACE", 1)

    def run(stages: list[Stage], *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["card.py", "--tiny", "--out", str(tmp_path), *arguments])
        assert card.main(stages) == 0
        return json.loads((tmp_path / "card.json").read_text())["stages"]

    return run


def test_one_bad_stage_does_not_stop_the_others(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [
        stage("crash", CRASHES), stage("lack", LACKS), stage("need", WRITES, ("nowhere_to_be_found",)), stage("good", WRITES),
    ]  # fmt: skip
    found = call(stages)
    assert {name: ran["status"] for name, ran in found.items()} == {
        "crash": "failed", "lack": "failed", "need": "failed", "good": "done",
    }  # fmt: skip
    assert "signal 11" in found["crash"]["why"] and "a_module_that_is_nowhere" in found["lack"]["why"]
    assert found["need"]["why"] == "not installed: nowhere_to_be_found"
    text = (tmp_path / "card.md").read_text()
    assert "### Films\n| a |" in text and text.index("## Stages") < text.index("## Goals")
    assert "before" in (tmp_path / "card.log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "card.log", "card.md"]


def test_what_hangs_is_stopped_and_its_results_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "GRACE", 1)
    hanging = stage("hang", HANGS)
    start = time.monotonic()
    command = hanging.command(tmp_path, 2, True, None)
    running = card.Running(hanging, command, {}, 2, tmp_path / "log")
    running.wait()
    ran = running.end()
    assert ran["status"] == "stopped" and time.monotonic() - start < 20
    assert card.results_of(hanging, tmp_path, 0) == {"rows": []}


def test_a_second_call_does_what_the_first_did_not(call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, late = stage("good", WRITES), stage("bad", LACKS), stage("late", WRITES)
    call([good, bad])
    mended = stage("bad", WRITES)
    ended = {"stages": {"good": {"status": "done"}, "bad": {"status": "failed"}}}
    assert [left.name for left in card.order([good, mended, late], ended)] == ["late", "bad"]
    capsys.readouterr()
    found = call([good, mended, late], "--resume")
    assert all(ran["status"] == "done" for ran in found.values())
    assert "good: at most" not in capsys.readouterr().out


def test_nothing_begins_without_time(call: Any) -> None:
    assert call([stage("good", WRITES)], "--minutes", "0.01") == {}


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real card")
def test_stages_find_the_simulated_card(call: Any) -> None:
    code = (
        "import json, sys, torch; x = torch.ones(2, device='cuda') + 1; "
        "json.dump({'rows': [{'card': torch.cuda.get_device_name(), 'sum': x.sum().item()}]}, open(sys.argv[1], 'w'))"
    )
    found = call([stage("card", code)], "--simulated")["card"]
    assert found["results"]["rows"] == [{"card": "Simulated H200", "sum": 4.0}] and found["tiny"]


def test_goals_are_reached_missed_or_not_measured() -> None:
    quick, slow = {"faces": {"ms": 20.0}}, {"faces": {"ms": 30.0}}
    most = Goal("faces", None, 25, "ms", lambda r: r["faces"]["ms"])
    least = Goal("faces", 25, None, "ms", lambda r: r["faces"]["ms"])
    assert [goal.row(r)[2] for goal in (most, least) for r in (quick, slow, {})] == [
        "reached", "missed", "not measured", "missed", "reached", "not measured",
    ]  # fmt: skip
    assert most.row(slow)[:2] == ("<= 25 ms", "30 ms")
    assert most.row({"faces": {"ms": float("nan")}})[2] == "missed"
    assert all(goal.row({})[2] == "not measured" for goal in card_plan.GOALS)


def test_goals_bear_results_that_broke_off() -> None:
    broken = {stage.name: {"rows": [], "results": {}, "families": [{"contestants": []}]} for stage in card_plan.STAGES}
    assert card_plan.goal_table(broken).count("not measured") > 20


# Says when it measures, and stops others meanwhile.
MEASURES = """
import json, sys, time
sys.path.insert(0, {folder!r})
from quiet import alone
time.sleep(0.5)
with alone(), alone():
    start = time.time()
    time.sleep(1)
    end = time.time()
json.dump({{"rows": [{{"start": start, "end": end}}]}}, open(sys.argv[1], "w"))
"""
# A child of the stage does the work, as compilers' workers are.
WORKS = """
import subprocess, sys
code = "import json, sys, time; stop = time.time() + 6; seen = []" + chr(10) + "while time.time() < stop:" + chr(10)
code += "    seen.append(time.time()); time.sleep(0.02)" + chr(10)
code += "json.dump({'rows': [{'seen': seen}]}, open(sys.argv[1], 'w'))"
sys.exit(subprocess.call([sys.executable, "-c", code, sys.argv[1]]))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="processes cannot be stopped there")
def test_stages_together_measure_one_at_a_time(call: Any, tmp_path: Path) -> None:
    measures = MEASURES.format(folder=str(Path(card.__file__).parent))
    crashes = "import time; time.sleep(1); " + CRASHES
    stages = [
        stage(name, code) for name, code in (("a", measures), ("b", measures), ("work", WORKS), ("crash", crashes))
    ]
    found = call(stages, "--together")
    assert [found[name]["status"] for name in ("a", "b", "work", "crash")] == ["done", "done", "done", "failed"]
    first, second = sorted((found[name]["results"]["rows"][0] for name in ("a", "b")), key=lambda row: row["start"])
    assert first["end"] <= second["start"]
    worked = found["work"]["results"]["rows"][0]["seen"]
    for row in (first, second):
        assert not [moment for moment in worked if row["start"] < moment < row["end"]]
    assert [moment for moment in worked if moment > second["end"]], "goes on afterwards"


def test_every_stage_has_its_program_and_names_its_file(tmp_path: Path) -> None:
    for planned in card_plan.STAGES:
        for tiny in (True, False):
            command = planned.command(tmp_path, 100, tiny, tmp_path / "peers")
            assert Path(command[1]).is_file() and str(tmp_path / f"{planned.name}.json") in command
            assert not any("{" in part for part in command)
    assert len(card_plan.gpu_tests()) > 5


def contestant(name: str, seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "left_out": "", "seconds": {"first": [seconds] * 3}, "psnr": {"first": 50.0, "second": 45.0},
        "new_graphs": {"first": 2, "second": 0}, "warm_up": 9.0, **changes,
    }  # fmt: skip


def test_z_image_is_judged_by_the_fastest_exact_way_that_ran() -> None:
    goal = next(goal for goal in card_plan.GOALS if goal.what == "Z-Image, bfloat16, against ComfyUI")
    psnr = next(goal for goal in card_plan.GOALS if goal.what.startswith("Z-Image, PSNR"))
    stock, plain = contestant("ComfyUI", 1.0), contestant("Hotpath compile, default", 0.8)
    best = contestant("Hotpath attention auto, reduce-overhead", 0.6, psnr={"first": 41.0})

    def judged(*contestants: Any) -> dict[str, Any]:
        return {"z_image": {"families": [{"contestants": list(contestants)}]}}

    assert goal.measured(judged(stock, plain, best)) == pytest.approx(0.6)
    assert psnr.measured(judged(stock, plain, best)) == 41.0
    for other in ({"left_out": "no time was left"}, {"seconds": {}}):
        assert goal.measured(judged(stock, plain, {**best, **other})) == pytest.approx(0.8)
    assert goal.row(judged(stock))[2] == "not measured"


class Family:
    title, steps = "a model", 2

    def __init__(self, *_: Any) -> None:
        from acceleration_models import Case

        self.cases = [
            Case(name, seed, 8, 64, 64) for seed, name in enumerate(("first", "second prompt", "second size"))
        ]


def test_contestants_leave_time_for_the_rounds_of_those_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import acceleration
    import torch

    now = [0.0]

    def run(case: Any) -> Any:
        now[0] += 1
        return torch.ones(1)

    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(acceleration, "time", clock)
    made = [acceleration.Contestant(name, lambda: run, est) for name, est in (("a", 0), ("b", 20), ("c", 40), ("d", 3))]
    acceleration.measure(Family(), made, until=60, rounds=30)
    assert [c.left_out for c in made] == ["", "", "no time was left", ""]
    assert len(made[0].seconds["first"]) == 14, "two rounds of nine seconds and then of three, after nine to be warm"
    assert len(made[0].seconds["second prompt"]) == 2


def test_a_stopped_run_leaves_what_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import acceleration
    import torch

    calls = []

    def run(case: Any) -> Any:
        calls.append(case.name)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return torch.ones(1)

    monkeypatch.setattr(acceleration, "use_comfyui", lambda on_cpu: None)
    monkeypatch.setattr(
        acceleration, "FAMILIES", {"z_image": lambda tiny: (Family(), [acceleration.Contestant("a", lambda: run)])}
    )
    file = tmp_path / "z_image.json"
    monkeypatch.setattr(sys, "argv", ["acceleration.py", "--tiny", "--out", str(tmp_path), "--json", str(file)])
    acceleration.main()
    ((found,),) = (family["contestants"] for family in json.loads(file.read_text())["families"])
    assert [len(times) for times in found["seconds"].values()] == [2, 1, 1]
    assert "a model" in (tmp_path / "acceleration.md").read_text()


def test_a_benchmark_measures_the_checkout_it_lies_in(tmp_path: Path) -> None:
    """Another one that is installed gives way; and what the tests' conftest.py sets, one thread, is for tests alone."""
    (tmp_path / "hotpath").mkdir()
    (tmp_path / "hotpath" / "__init__.py").write_text("raise ImportError('the other one')")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(BENCHMARKS)])}
    command = [sys.executable, "-c", "import checkout, hotpath; print(hotpath.__file__)"]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found) == BENCHMARKS.parent / "__init__.py"
    texts = {path.name: path.read_text("utf-8") for path in BENCHMARKS.glob("*.py")}
    own_ways = [name for name, text in texts.items() if "import conftest" in text or 'find_spec("hotpath")' in text]
    assert not own_ways, f"these find the pack in another way than checkout.py: {own_ways}"
