"""What telemetry measures, checked against plain hooks and plain arithmetic; profiles as files; patch mode adaptive."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hotpath.identity.blocks import INDEX, SDXL_BLOCKS
from hotpath.identity.contribution_drawing import draw_contributions
from hotpath.identity.contribution_profile import (
    ContributionProfile,
    ProfileError,
    load_profile,
    make_profile,
    safe_name,
    save_profile,
)
from hotpath.identity.contributions import Contributions, table
from hotpath.patches.sdxl_layout import AdaptiveChoice, choose_blocks
from hotpath.patches.telemetry import KEPT_CALLS, KEPT_STEPS, BlockTelemetry

CPU = torch.device("cpu")


def random_contributions(steps: int = 6, seed: int = 0) -> Contributions:
    rng = np.random.default_rng(seed)
    own = rng.uniform(1, 9, (steps, 70))
    return Contributions(SDXL_BLOCKS, np.geomspace(14.6, 0.03, steps), own * rng.uniform(0, 0.3, (steps, 70)), own)


def random_profile(seed: int = 0) -> ContributionProfile:
    settings = ({"adapter": "a", "weight": 0.8},)
    return make_profile(random_contributions(seed=seed), "a portrait", "m", settings, "test")


class TestContributions:
    def test_sizes_and_shares_are_the_arithmetic_of_the_energies(self) -> None:
        found = random_contributions()
        naive = [
            sum(math.sqrt(found.identity[s, b] / found.own[s, b]) for s in range(6)) / 6
            for b in range(len(SDXL_BLOCKS))
        ]
        assert found.size == pytest.approx(naive)
        assert found.share == pytest.approx([n / sum(naive) for n in naive])

    def test_what_was_not_measured_is_no_zero_in_the_picture_and_none_in_the_shares(self) -> None:
        found = random_contributions()
        found.own[:, 3] = found.identity[:, 3] = 0
        found.own[2] = found.identity[2] = 0  # a step in which no identity acts
        assert not found.measured[3] and found.share[3] == 0 and np.isnan(found.relative[2]).all()
        # The mean is over the five steps that were measured.
        assert found.size[0] == pytest.approx(
            np.sqrt(found.identity[:, 0] / np.where(found.own[:, 0], found.own[:, 0], 1)).sum() / 5
        )
        assert found.share.sum() == pytest.approx(1)

    def test_nan_is_named_with_its_block(self) -> None:
        bad = random_contributions()
        own = bad.own.copy()
        own[1, INDEX[("middle", 0, 2)]] = np.inf
        with pytest.raises(ValueError, match=r"not finite \(NaN\) in middle\.0\.2:"):
            Contributions(SDXL_BLOCKS, bad.sigmas, bad.identity, own)

    def test_table_and_picture_show_every_block(self) -> None:
        found = random_contributions()
        text = table(found)
        assert "70 of 70 blocks measured over 6 steps" in text
        rows = [line.split() for line in text.splitlines()[-70:]]
        assert {row[0] for row in rows} == {".".join(map(str, b)) for b in SDXL_BLOCKS}
        sizes = [float(row[1]) for row in rows]
        assert sizes == sorted(sizes, reverse=True) and rows[-1][-1] == "100.0%"
        picture = draw_contributions(found)
        assert picture.shape[0] == 1 and picture.shape[1] > 70 * 12 and picture.shape[3] == 3
        assert picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0.05

    def test_the_picture_is_in_the_order_of_the_data(self) -> None:
        found = random_contributions()
        assert [found.blocks[i][0] for i in found.in_network_order()] == ["input"] * 24 + ["middle"] * 10 + [
            "output"
        ] * 36

    def test_without_matplotlib_the_picture_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn = draw_contributions(random_contributions())
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        sentence = draw_contributions(random_contributions())
        assert sentence.shape == (1, 64, 640, 3) != drawn.shape and sentence.min() < 0.5

    def test_a_picture_of_nothing_is_still_a_picture(self) -> None:
        nothing = Contributions(SDXL_BLOCKS, np.zeros(0), np.zeros((0, 70)), np.zeros((0, 70)))
        assert draw_contributions(nothing).shape[3] == 3


class TestRecorder:
    def test_calls_at_one_noise_level_add_up(self) -> None:
        recorder = BlockTelemetry()
        for number, sigma in enumerate((14.6, 14.6, 0.5)):
            energies = recorder.begin_call(torch.tensor([sigma, sigma]), CPU)
            assert energies.shape == (70, 2) and energies.dtype == torch.float32 and not energies.any()
            energies[:, 0] += number + 1
            energies[:, 1] += 4
        found = recorder.contributions()
        assert found.sigmas == pytest.approx([14.6, 0.5]) and found.calls == 3
        assert found.identity[:, 7].tolist() == [3, 3] and found.own[:, 7].tolist() == [8, 4]
        assert recorder.contributions().identity.tolist() == found.identity.tolist()  # reading takes nothing away

    def test_a_run_begins_anew_unless_runs_are_kept(self) -> None:
        for keep, calls in ((False, 2), (True, 6)):
            recorder = BlockTelemetry(keep_runs=keep)
            for _ in range(3):
                recorder.begin_run()
                for sigma in (1.0, 0.5):
                    recorder.begin_call(torch.tensor([sigma]), CPU).fill_(1)
            found = recorder.contributions()
            assert (found.calls, found.runs, len(found.sigmas)) == (calls, 3 if keep else 1, 2)

    def test_the_noise_level_is_copied(self) -> None:
        recorder, level = BlockTelemetry(), torch.tensor([3.0])
        recorder.begin_call(level, CPU).fill_(1)
        level.fill_(2.0)
        assert recorder.contributions().sigmas.tolist() == [3.0]

    def test_a_sampler_without_a_noise_level(self) -> None:
        recorder = BlockTelemetry()
        recorder.begin_call(None, CPU).fill_(2)
        assert recorder.contributions().own.sum() == 140

    def test_memory_is_bounded_and_nothing_is_lost(self) -> None:
        recorder = BlockTelemetry()
        total = KEPT_CALLS + KEPT_STEPS + 500
        for number in range(total):
            recorder.begin_call(torch.tensor([float(number)]), CPU).fill_(1)
            assert len(recorder._calls.waiting) <= KEPT_CALLS
        found = recorder.contributions()
        assert len(found.sigmas) <= KEPT_STEPS
        assert found.own.sum() == 70 * total

    def test_threads_and_deep_copies_record_into_one_place(self) -> None:
        recorder = BlockTelemetry()
        copies = copy.deepcopy({"transformer_options": {"hotpath_telemetry": recorder}})
        same = copies["transformer_options"]["hotpath_telemetry"]
        assert same is recorder

        def work() -> None:
            for _ in range(200):
                same.begin_call(torch.tensor([1.0]), CPU).add_(1)
                same.add(SDXL_BLOCKS[0], torch.full((4,), 2.0), torch.full((4,), 3.0))
                same.add(SDXL_BLOCKS[0], torch.full((4,), 2.0), torch.full((4,), 3.0))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = recorder.contributions()
        assert found.calls == 800
        # Two contributions of 4 * 2 * 2, and the block's own 4 * 3 * 3 once.
        assert found.identity[0, 0] == 800 * (1 + 32) and found.own[0, 0] == 800 * (1 + 36)


class TestProfile:
    def test_round_trip(self, tmp_path: Path) -> None:
        profile = random_profile()
        path = save_profile(profile, tmp_path / "profiles")
        assert path.name == "a portrait.json" and load_profile(path) == profile
        data = json.loads(path.read_text())
        assert data["format"] == "hotpath.block_profile" and data["version"] == 1
        assert data["blocks"]["input.4.0"]["share"] == pytest.approx(profile.share[("input", 4, 0)])
        assert sum(profile.share.values()) == pytest.approx(1)
        assert list(tmp_path.rglob("*.part")) == []

    @pytest.mark.parametrize("share", [0.05, 0.5, 0.8, 0.95, 0.999, 1.0])
    def test_the_blocks_kept_carry_the_share_and_one_fewer_would_not(self, share: float) -> None:
        profile = random_profile(3)
        chosen, carried = profile.fewest_blocks(share, SDXL_BLOCKS)
        total = sum(profile.size.values())
        assert carried == pytest.approx(sum(profile.size[b] for b in chosen) / total)
        assert carried >= share - 1e-9
        # No set of one block fewer carries it: the largest of that size does not.
        best = sum(sorted(profile.size.values(), reverse=True)[: len(chosen) - 1])
        assert best / total < share
        assert list(chosen) == sorted(chosen, key=SDXL_BLOCKS.index)

    def test_the_fewest_of_few_blocks_by_trying_all(self) -> None:
        blocks = SDXL_BLOCKS[:8]
        sizes = dict(zip(blocks, (0.3, 0.1, 0.1, 0.2, 0.05, 0.0, 0.15, 0.1), strict=True))
        profile = ContributionProfile("x", sizes)
        for share in np.linspace(0.05, 1, 20):
            chosen, _ = profile.fewest_blocks(float(share), blocks)
            enough = [
                n
                for n in range(1, 9)
                if any(sum(sizes[b] for b in c) >= share - 1e-9 for c in itertools.combinations(blocks, n))
            ]
            assert len(chosen) == enough[0], share

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda d: d.update(format="else"), "does not begin with"),
            (lambda d: d.update(version=2), "it is of version 2"),
            (lambda d: d.pop("date"), "date is no line"),
            (lambda d: d.update(name="a\nb"), "name is no line"),
            (lambda d: d.update(runs=True), "runs is no whole number"),
            (lambda d: d.update(sigmas=["1"]), "sigmas is no list"),
            (lambda d: d.update(settings={}), "settings is no list"),
            (lambda d: d["blocks"].pop("middle.0.3"), "70 blocks once; it has 69"),
            (lambda d: d["blocks"].update({"output.9.0": None}), "it has 71 of other names"),
            (lambda d: d["blocks"].update({"input.4.0": 0.5}), "block input.4.0 must have size and share"),
            (lambda d: d["blocks"]["input.4.0"].update(size=-1), "numbers from 0 up"),
            (lambda d: d["blocks"]["input.4.0"].update(size=True), "numbers from 0 up"),
            (lambda d: d["blocks"]["input.4.0"].update(size=10**400), "numbers from 0 up"),
            (lambda d: [b.update(size=1.7e308) for b in d["blocks"].values()], "numbers from 0 up"),
            (lambda d: d["blocks"]["input.4.0"].update(share=0.9), "contradict"),
            (lambda d: d.update(blocks=dict.fromkeys(d["blocks"])), "no block has a contribution"),
            (lambda d: d.update(blocks=None), "it has none"),
        ],
    )
    def test_another_file_is_refused_with_a_sentence(self, tmp_path: Path, change: Any, reason: str) -> None:
        path = save_profile(random_profile(), tmp_path)
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        with pytest.raises(ProfileError, match=reason) as error:
            load_profile(path)
        assert path.name in str(error.value)

    @pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format": NaN}', "[" * 100_000, "\xff\xfe", "3"])
    def test_what_is_no_profile_at_all(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "x.json"
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ProfileError, match=r"x\.json is no block profile"):
            load_profile(path)

    def test_a_huge_file_is_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_bytes(b" " * ((1 << 20) + 1))
        with pytest.raises(ProfileError, match="larger than 1 MiB"):
            load_profile(path)

    def test_names_stay_in_their_folder(self, tmp_path: Path) -> None:
        for name in ("../../etc/x", "a/b\\c", "..", "", "con:|?*", "x" * 500, "ä" * 300):
            safe = safe_name(name)
            assert (tmp_path / f"{safe}.json").resolve().parent == tmp_path.resolve() and len(safe.encode()) <= 200

    def test_nothing_measured_is_no_profile(self) -> None:
        nothing = Contributions(SDXL_BLOCKS, np.zeros(0), np.zeros((0, 70)), np.zeros((0, 70)))
        with pytest.raises(ProfileError, match=r"Nothing was measured: .* let start_at of InstantID lie before end_at"):
            make_profile(nothing, "x")

    def test_one_step_is_no_steps(self) -> None:
        one = random_contributions(1)
        assert "over 1 step, 1 run, " in make_profile(one, "x").describe() and "over 1 step (" in table(one)

    def test_a_picture_of_few_steps_and_few_blocks_holds_its_title_and_claims_no_more(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("matplotlib")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image

        seen: list[Any] = []

        def not_drawn(canvas: Any, file: Any) -> None:
            seen.append(canvas.figure)
            Image.new("RGB", (1, 1)).save(file, "PNG")

        monkeypatch.setattr(FigureCanvasAgg, "print_png", not_drawn)
        one = random_contributions(1)
        one.own[:, :24] = one.identity[:, :24] = 0
        draw_contributions(one, "W" * 200 + ": what the identity adds to each block")
        (figure,) = seen
        assert figure._suptitle.get_window_extent(figure.canvas.get_renderer()).width <= figure.bbox.width
        said = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert said[0] == "input: not measured" and said[1].startswith("middle ") and said[1].endswith(" %")
        assert figure.axes[0].get_xlabel().startswith("noise level (sigma) of the 1 step;")


class TestAdaptiveChoice:
    def test_without_a_profile_all_blocks_and_a_line(self) -> None:
        blocks, line = choose_blocks(SDXL_BLOCKS, "adaptive")
        assert blocks == SDXL_BLOCKS
        assert line == "patch_mode adaptive needs a profile, and none is connected, so all 70 blocks are patched"

    def test_with_a_profile(self) -> None:
        profile = random_profile()
        blocks, line = choose_blocks(SDXL_BLOCKS, "adaptive", adaptive=AdaptiveChoice(profile, 0.6))
        chosen, carried = profile.fewest_blocks(0.6, SDXL_BLOCKS)
        assert blocks == chosen and 20 < len(blocks) < 60
        assert f"{len(blocks)} of 70 blocks patched" in line and "60.0%" in line and f"carry {carried:.1%}" in line

    def test_unmeasured_blocks_are_left_out_and_counted(self) -> None:
        profile = random_profile()
        part = ContributionProfile("part", {b: s for b, s in profile.size.items() if b[0] == "output"})
        blocks, line = choose_blocks(SDXL_BLOCKS, "adaptive", adaptive=AdaptiveChoice(part, 1.0))
        assert len(blocks) == 36 and "34 blocks were not measured" in line

    def test_another_layout_is_patched_in_full(self) -> None:
        blocks, line = choose_blocks(SDXL_BLOCKS[:17], "adaptive", adaptive=AdaptiveChoice(random_profile(), 0.5))
        assert len(blocks) == 17 and "17 of SDXL's 70 blocks, so all 17 blocks are patched" in line


@pytest.mark.parametrize("name", ["two\nlines", "x" * 1200, "bell\x07", "half\ud800", "\n", "cost $\\frac{1$"])
def test_every_name_can_be_saved_read_and_drawn(tmp_path: Path, name: str) -> None:
    found = random_contributions()
    made = make_profile(found, name)
    assert load_profile(save_profile(made, tmp_path)) == made
    pytest.importorskip("matplotlib")
    assert draw_contributions(found, made.name).shape[-1] == 3
