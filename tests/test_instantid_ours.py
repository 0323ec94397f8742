"""Our InstantID nodes: the same pictures as the compatible ones where settings match, and what only ours can do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from foreign_faces import ForeignFaceAnalysis
from hotpath.identity.contribution_profile import ContributionProfile
from instantid_bench import (
    apply,
    attention_patches,
    callback_counts,
    identity,
    in_windows,
    sample,
    several,
    shallow_bench,
    shared_bench,
)
from instantid_scenarios import Bench, mask, photo

pytestmark = pytest.mark.comfy


@pytest.fixture
def bench() -> Bench:
    return shallow_bench()


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def test_equal_settings_give_the_pictures_of_the_compatible_node(bench: Bench) -> None:
    for changes in ({}, {"mask": mask(4)}, {"image_kps": photo(12)}):
        theirs = bench.advanced(middle_block=True, **changes)
        if "image_kps" in changes:
            changes = {**changes, "insightface": bench.faces}
        *ours, report = apply(bench, face_tokens_for="every ControlNet", **changes)
        assert torch.equal(sample(*ours), sample(*theirs)), changes
        assert "11 of 11 blocks" in report


def test_identity_tokens_reach_identity_net_either_way(bench: Bench) -> None:
    """With IdentityNet alone in the chain, giving it the tokens privately must change nothing."""
    *legacy, _ = apply(bench, face_tokens_for="every ControlNet")
    *private, _ = apply(bench)
    assert torch.allclose(sample(*legacy), sample(*private), atol=1e-3)
    *masked_legacy, _ = apply(bench, face_tokens_for="every ControlNet", mask=mask(4))
    *masked, _ = apply(bench, mask=mask(4))
    assert torch.allclose(sample(*masked_legacy), sample(*masked), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize(("seen_by", "expected"), [("IdentityNet only", 77), ("every ControlNet", 16)])
def test_other_control_nets_keep_the_prompt(bench: Bench, seen_by: str, expected: int) -> None:
    seen: list[int] = []
    depth_net = bench.control_net.copy().set_cond_hint(torch.rand(1, 3, 128, 128), 0.4, (0.0, 1.0))
    inner = depth_net.control_model

    class Spy(torch.nn.Module):
        dtype = inner.dtype

        def forward(self, **kwargs: Any) -> Any:
            seen.append(kwargs["context"].shape[1])
            return inner(**kwargs)

    depth_net.control_model = Spy()
    positive = [[c, {**o, "control": depth_net}] for c, o in bench.positive]
    negative = [[c, {**o, "control": depth_net}] for c, o in bench.negative]
    *result, _ = apply(bench, positive=positive, negative=negative, face_tokens_for=seen_by)
    assert torch.isfinite(sample(*result)).all()
    assert set(seen) == {expected}


@pytest.mark.parametrize(
    ("mode", "count"), [("full", 70), ("balanced", 55), ("fast", 20), ("output_only", 36), ("custom", 7)]
)
def test_patch_modes_keep_absolute_keys_and_values(mode: str, count: int) -> None:
    bench = shared_bench()
    full = attention_patches(apply(bench)[0])
    model, _, _, report = apply(bench, patch_mode=mode, custom_blocks="input.4, output.1.0-2, 68 69")
    chosen = attention_patches(model)
    assert len(chosen) == count
    assert f"{count} of 70 blocks" in report
    for block, patch in chosen.items():
        assert patch.callback[0].index == full[block].callback[0].index


def test_a_custom_list_that_names_nothing_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match=r"'output.9' names no SDXL block"):
        apply(bench, patch_mode="custom", custom_blocks="output.9")


def test_the_report_does_not_claim_what_never_acts(bench: Bench) -> None:
    patched, *_, report = apply(bench, start_at=0.8, end_at=0.2)
    assert "blocks patched (" in report and "start_at lies after end_at, so the identity never acts" in report
    patched, *_, report = apply(bench, weight=0.0)
    assert not attention_patches(patched) and report.startswith("no block is patched: weight is 0\n")
    *_, report = apply(bench, profile=ContributionProfile("portrait", {("output", 0, 0): 1.0}))
    assert "the profile is used by patch_mode adaptive only" in report


def test_an_unknown_layout_is_patched_in_full_with_a_message(bench: Bench) -> None:
    from hotpath_demo import tiny_sdxl

    small = tiny_sdxl.make_sdxl(
        transformer_depth=[0, 0, 1, 1, 2, 2],
        transformer_depth_output=[0, 0, 0, 1, 1, 1, 2, 2, 2],
        transformer_depth_middle=2,
    )
    model, _, _, report = apply(bench, model=small, patch_mode="fast", pose=False)
    assert callback_counts(model) == [1] * 17
    assert "patch_mode fast is not defined for it: all 17 are patched" in report


def test_without_pose_identity_net_is_left_out(bench: Bench) -> None:
    for changes in ({"pose": False}, {"cn_strength": 0.0}, {"control_net": None}):
        _, positive, negative, report = apply(bench, **changes)
        assert "control" not in positive[0][1]
        assert "control" not in negative[0][1]
        assert "IdentityNet is left out" in report


@pytest.mark.parametrize("node", ["compatible", "every ControlNet", "IdentityNet only"])
def test_what_others_do_to_a_conditioning_does_not_reach_the_cache(bench: Bench, node: str) -> None:
    def tokens() -> torch.Tensor:
        positive = (bench.apply() if node == "compatible" else apply(bench, face_tokens_for=node))[1]
        options = positive[0][1]
        if node == "IdentityNet only":
            return next(v for k, v in options["model_conds"].items() if "face_tokens" in k).cond
        return options["cross_attn_controlnet"]

    handed_out = tokens()
    before = handed_out.clone()
    handed_out.zero_()
    assert before.any() and torch.equal(tokens(), before)


def test_a_saved_identity_gives_the_same_picture_without_its_photo(bench: Bench, tmp_path: Any) -> None:
    from hotpath.identity import load_identity, save_identity

    person = identity(bench)
    travelled = load_identity(save_identity(person, tmp_path / "person.safetensors"))
    assert torch.equal(sample(*apply(bench, identity=travelled)[:3]), sample(*apply(bench, identity=person)[:3]))


def count_rows(model: Any, run: Any) -> int:
    from comfy.patcher_extension import WrappersMP

    rows = 0

    def spy(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        rows += x.shape[0]
        return executor(x, *args, **kwargs)

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", spy)
    run(watched)
    return rows


def test_two_people_cost_one_pass(bench: Bench) -> None:
    model, positive, negative, report = several(bench)
    assert callback_counts(model) == [2] * 11
    assert "person 1" in report
    assert "person 2" in report
    one_pass = count_rows(model, lambda m: sample(m, positive, negative))
    chained, pos1, neg1 = bench.apply(mask=mask(3))
    chained, pos2, neg2 = bench.apply(image=photo(2), model=chained, mask=1 - mask(3))
    two_passes = count_rows(chained, lambda m: sample(m, pos1 + pos2, neg1 + neg2))
    assert two_passes == 2 * one_pass


def test_two_nodes_in_a_row_are_two_people(bench: Bench) -> None:
    """Each IdentityNet gets its own person's tokens, whether one node put both there or each its own."""
    model, positive, negative, _ = apply(bench, identity=identity(bench, 1))
    before = {name for _, options in positive for name in options["model_conds"]}
    chained = apply(bench, identity=identity(bench, 2), model=model, positive=positive, negative=negative)[:3]
    together = several(bench, mask_1=None, mask_2=None, weight_1=0.7, weight_2=0.7)[:3]
    assert torch.equal(sample(*chained), sample(*together))
    assert {name for _, options in positive for name in options["model_conds"]} == before


def test_people_stay_in_their_masks(bench: Bench) -> None:
    """A mask of zeros switches a person off, attention and IdentityNet alike."""
    nowhere = torch.zeros(1, 32, 32)
    everywhere = torch.ones(1, 32, 32)
    with_ghost = sample(*several(bench, mask_1=everywhere, mask_2=nowhere)[:3])
    alone = sample(*several(bench, mask_1=everywhere, identity_2=None, mask_2=None)[:3])
    assert torch.allclose(with_ghost, alone, atol=1e-2)
    other = sample(*several(bench, mask_1=nowhere, mask_2=everywhere)[:3])
    assert not torch.allclose(with_ghost, other, atol=1.0)


def test_faces_go_to_the_people_whose_masks_cover_them(bench: Bench) -> None:
    from hotpath.face import Faces
    from hotpath.patches.identities import Person, _assign

    boxes = torch.tensor([[60.0, 10, 90, 40], [5, 10, 35, 40]])
    found = Faces(boxes, torch.zeros(2, 5, 2), torch.ones(2), None, (50, 100), 640)
    left = torch.zeros(1, 50, 100)
    left[..., :50] = 1
    person = identity(bench)
    assert _assign([Person(person, 1.0, 1 - left), Person(person, 1.0, left)], found) == [0, 1]
    assert _assign([Person(person, 1.0), Person(person, 1.0)], found) == [1, 0]  # left to right
    assert _assign([Person(person, 1.0), Person(person, 1.0, left)], found) == [0, 1]


def test_a_control_net_with_face_tokens_is_copied_with_them() -> None:
    from comfy.controlnet import ControlBase
    from hotpath.patches.face_token_link import face_token_link

    class Net(ControlBase):
        def copy(self) -> Any:
            made = Net()
            self.copy_to(made)
            return made

        def deepclone_multigpu(self, load_device: Any, autoregister: bool = False) -> Any:
            return self.copy()

        def get_control(self, x: Any, t: Any, cond: Any, *_: Any) -> Any:
            return {"output": [cond["crossattn_controlnet"]]}

    region = torch.zeros(8, 8)
    region[:, :4] = 1
    link = face_token_link(Net(), "tokens", region)
    link.strength, link.timestep_percent_range = 0.5, (0.2, 0.8)
    cond = {"tokens": torch.ones(1, 2, 8, 8), "crossattn_controlnet": None}
    for made in (link.copy(), link.deepclone_multigpu("a card", autoregister=True)):
        assert made is not link and (made.strength, made.timestep_percent_range) == (0.5, (0.2, 0.8))
        given = made.get_control(torch.zeros(1), torch.zeros(1), cond, 1, {})["output"][0]
        assert given[..., :4].eq(0.5).all() and given[..., 4:].eq(0).all()
    assert list(link.multigpu_clones) == ["a card"]
    link.deepclone_multigpu("another")
    assert list(link.multigpu_clones) == ["a card"]


@pytest.mark.parametrize("link", ["AnimateDiff-Evolved", "Advanced-ControlNet inside"])
def test_drawings_and_regions_follow_context_windows(link: str) -> None:
    from types import SimpleNamespace

    from comfy.controlnet import ControlBase
    from hotpath.patches.face_token_link import face_token_link

    class Net(ControlBase):
        def get_control(self, x: Any, t: Any, cond: Any, *_: Any) -> Any:
            whole = self.cond_hint_original
            own = whole[: len(x)] if link == "AnimateDiff-Evolved" else whole[self.sub_idxs or slice(len(x))]
            return {"output": [own[:, :1].clone()]}

        def copy(self) -> Any:
            made = Net()
            self.copy_to(made)
            return made

    net = Net()
    frames = torch.arange(6.0)[:, None, None, None].expand(6, 3, 8, 8)
    net.cond_hint_original = frames
    if link != "AnimateDiff-Evolved":
        net.sub_idxs = None
    made = face_token_link(
        net, "tokens", torch.tensor([1.0, 1, 1, 2])[:, None, None].expand(4, 8, 8)
    )  # the last is repeated
    assert made.sub_idxs is None, "else AnimateDiff-Evolved refuses it"

    def seen(options: Any, link: Any = made, count: int = 2) -> list[float]:
        given = link.get_control(torch.zeros(count, 4, 1, 1), torch.zeros(1), {}, 1, options)["output"][0]
        return given[:, 0, 0, 0].tolist()

    for window in ((0, 1), (4, 5), (5, 0)):
        expected = [float(i * (2 if i > 2 else 1)) for i in window]
        assert seen({"ad_params": {"sub_idxs": list(window), "full_length": 6}}) == expected
        native = SimpleNamespace(dim=0, index_list=list(window), total_frames=6)
        assert seen({"context_window": native}) == expected
    if link == "AnimateDiff-Evolved":
        assert seen({}, made.copy(), 6) == [0, 1, 2, 6, 8, 10], "a copy has all drawings"
    assert seen({}) == [0, 1]
    made.cleanup()
    assert net.cond_hint_original is frames and not made.regions


@pytest.mark.long
def test_frames_are_the_same_in_one_window_or_in_several(bench: Bench) -> None:
    """Each has a mask and a pose of its own, and without a motion model nothing of the others."""
    poses = torch.cat([photo(seed) for seed in range(6)])
    model, *conditionings, _ = apply(bench, mask=mask(4, count=6), image_kps=poses, insightface=bench.faces)
    whole = sample(model, *conditionings, steps=1, batch=6, size=(8, 8))
    parts = sample(in_windows(model), *conditionings, steps=1, batch=6, size=(8, 8))
    assert torch.allclose(parts, whole, atol=0.05, rtol=1e-3) and not torch.allclose(whole[4], whole[2], atol=1.0)


def test_a_mask_covers_a_face_by_what_lies_in_its_box() -> None:
    from hotpath.face import Faces
    from hotpath.patches.identities import _coverage

    boxes = torch.tensor([[40.0, 10, 60, 30], [-20, -20, 10, 10], [95, 40, 130, 80], [200, 10, 220, 30]])
    found = Faces(boxes, torch.zeros(4, 5, 2), torch.ones(4), None, (50, 100), 640)
    left = torch.zeros(50, 100)
    left[:, :45] = 1
    for region in (left, left[None], left[None, ::2, ::2]):
        covered = [_coverage(region, found, face) for face in range(4)]
        assert covered == pytest.approx([0.25, 1, 0, 0], abs=0.06)


def test_too_few_faces_for_the_people_is_one_sentence(bench: Bench) -> None:
    with pytest.raises(ValueError, match="shows 0 faces for 2 identities"):
        several(bench, image_kps=torch.zeros(1, 64, 64, 3), insightface=ForeignFaceAnalysis())


def test_a_mask_with_nan_is_refused(bench: Bench) -> None:
    broken = mask(1)
    broken[0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="mask holds values that are not finite"):
        apply(bench, mask=broken)


def test_tokens_without_a_photo_serve_the_control_net_node(bench: Bench) -> None:
    """Face tokens of a saved person are those Patch Attention gives for the photo, and can be looked at."""
    _, from_photo = bench.patch(noise=0.35)
    made, picture, report = bench.call(
        "HotpathIdentityTokens",
        instantid=bench.instantid,
        identity=identity(bench),
        noise=0.35,
        combine_embeds="average",
    )
    assert torch.equal(made["cond"], from_photo["cond"])
    assert torch.equal(made["uncond"], from_photo["uncond"])
    assert "16 tokens, 64 wide, for 70 blocks" in report
    assert picture.shape == (1, 256, 768, 3)
    assert 0 <= picture.min() < picture.max() <= 1
    other = bench.call(
        "HotpathIdentityTokens",
        instantid=bench.instantid,
        identity=identity(bench, 2),
        noise=0.35,
        combine_embeds="average",
    )
    assert not torch.equal(other[1], picture)


def spied(control_net: Any) -> tuple[Any, list[torch.Tensor]]:
    """A copy of `control_net`, and what its network is given as context for each call, one entry a conditioning."""
    seen: list[torch.Tensor] = []
    copy = control_net.copy()
    inner = copy.control_model

    class Spy(torch.nn.Module):
        dtype = inner.dtype

        def forward(self, **kwargs: Any) -> Any:
            seen.extend(kwargs["context"].split(2))
            return inner(**kwargs)

    copy.control_model = Spy()
    return copy, seen


def tokens_through_another_node(bench: Bench, person: Any, control_net: Any) -> None:
    made, *_ = bench.call(
        "HotpathIdentityTokens", instantid=bench.instantid, identity=person, noise=0.35, combine_embeds="concat"
    )
    positive, negative = bench.call(
        "ApplyInstantIDControlNet", face_embeds=made, control_net=control_net, image_kps=torch.rand(1, 128, 128, 3),
        positive=bench.positive, negative=bench.negative, strength=1.0, start_at=0.0, end_at=1.0,
    )  # fmt: skip
    sample(bench.model, positive, negative, batch=2)


@pytest.mark.parametrize("node", ["HotpathInstantID", "HotpathIdentityTokens"])
def test_tokens_of_several_photos_are_for_every_picture_of_a_batch(bench: Bench, node: str) -> None:
    control_net, seen = spied(bench.control_net)
    photos = torch.cat((photo(1), photo(2)))
    person = bench.call("HotpathIdentity", insightface=bench.faces, image=photos, name="two photos")[0]
    if node == "HotpathInstantID":
        model, positive, negative, *_ = apply(bench, identity=person, control_net=control_net, combine_embeds="concat")
        sample(model, positive, negative, batch=2)
    else:
        tokens_through_another_node(bench, person, control_net)
    assert seen
    for one, other in seen:
        assert one.shape[0] == 32 and torch.equal(one, other)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_grey_drawing_and_one_with_alpha_set_the_pose(bench: Bench, channels: int) -> None:
    drawing = torch.rand(1, 128, 128, 1, generator=torch.Generator().manual_seed(5)).expand(-1, -1, -1, 3)
    other = drawing[..., :1] if channels == 1 else torch.cat((drawing, torch.rand(1, 128, 128, 1)), -1)
    pictures = [sample(*bench.apply(image_kps=kps)) for kps in (drawing, other)]
    assert torch.equal(*pictures)
