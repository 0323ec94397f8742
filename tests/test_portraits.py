"""The demo's trained portrait model: InstantID on it gives the person that was given, where the key points say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hotpath import demo, face
from hotpath.demo.comfy_nodes import hotpath_demo
from hotpath.demo.comfy_nodes.hotpath_demo import portraits
from hotpath.demo.face_drawings import Person
from hotpath.demo.portrait_drawings import draw_portrait
from hotpath.face import DetectionOptions, FaceChoice
from torch.nn.functional import normalize

ROOT = Path(demo.__file__).parent
SIDE = 128
CPU = torch.device("cpu")
pytestmark = pytest.mark.xdist_group("portraits")


def drawn(person: Person, x: float = 64, tall: float = 64, background: str = "grey") -> torch.Tensor:
    """[1, 512, 512, 3]: what somebody would give as a photo; lengths are those of the generated picture."""
    k = 512 / SIDE
    place = [(x * k, 60 * k, tall * k, 0.05)]
    portrait = draw_portrait((person,), place, np.random.default_rng(1), (512, 512), "green", background)
    return torch.from_numpy(portrait.picture).float()[None] / 255


def people(count: int, seed: int = 99) -> list[Person]:
    """Nobody of them was drawn for training."""
    rng = np.random.default_rng(seed)
    return [Person.random(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def analyser() -> Any:
    return face.load_analyser([ROOT / "models" / "insightface"], engine="torch", device=CPU, remember=False)


def found(analyser: Any, pictures: torch.Tensor) -> list[Any]:
    options = DetectionOptions(sizes=(256,))
    return list(analyser.analyse(pictures, choose=FaceChoice.largest(), options=options, embed=True))


def test_text_is_read_for_shirt_and_background():
    assert portraits.phrases("A RED shirt before a blue wall") == {"shirt": "red", "background": "blue"}
    assert portraits.phrases("portrait photo of an astronaut, soft window light") == {
        "shirt": "orange",
        "background": "white",
    }
    assert portraits.phrases("blurry, low quality, watermark") == {}
    tokens, pooled = portraits.embed_text("nothing it knows")
    assert torch.equal(tokens, portraits.embed_text("")[0]) and pooled.shape == (1280,)
    assert not torch.equal(tokens[1], portraits.embed_text("red shirt")[0][1])


def test_the_demos_control_net_as_it_is_added_to_a_graph_is_identity_net(monkeypatch):
    monkeypatch.setattr(portraits, "load_identity_net", lambda trained: trained)
    declared = hotpath_demo.DemoControlNet.INPUT_TYPES()["required"]["control_net_name"][1]["default"]
    assert hotpath_demo.DemoControlNet().load(declared) == (True,)
    assert hotpath_demo.DemoControlNet().load("depth.safetensors") == (False,)


def test_pictures_survive_the_coder():
    pixels = portraits.PortraitPixels()
    for person in people(3):
        picture = drawn(person)
        small = torch.nn.functional.interpolate(picture.movedim(-1, 1), size=(SIDE, SIDE), mode="area").movedim(1, -1)
        latents = pixels.encode(small)
        assert latents.shape == (1, 4, 16, 16) and 0.5 < float((latents * portraits.LATENT_SCALE).std()) < 2
        assert float((pixels.decode(latents) - small).abs().mean()) * 255 < 4
    assert pixels.encode(torch.rand(1, 70, 100, 3)).shape == (1, 4, 8, 12)


def test_a_row_of_one_becomes_a_row_of_ten():
    state = {"middle_block.1.transformer_blocks.0.ff.net.2.weight": torch.ones(2, 2), "out.bias": torch.ones(1)}
    state["middle_block.1.transformer_blocks.0.attn2.to_k.weight"] = torch.ones(2, 2)
    deep = portraits.deepened(state, {"middle_block.1.transformer_blocks.": 10})
    assert len(deep) == 21 and float(deep["out.bias"]) == 1
    total = sum(deep[f"middle_block.1.transformer_blocks.{i}.ff.net.2.weight"] for i in range(10))
    assert torch.allclose(total, torch.ones(2, 2))
    assert float(deep["middle_block.1.transformer_blocks.9.attn2.to_k.weight"][0, 0]) == 1


@pytest.mark.comfy
class TestInComfyUI:
    @pytest.fixture(scope="class")
    def parts(self) -> dict[str, Any]:
        from hotpath.identity.adapter import load_adapter

        return {
            "model": portraits.load_sdxl(),
            "control_net": portraits.load_identity_net(),
            "adapter": load_adapter(ROOT / "models" / "instantid" / "demo_adapter.safetensors"),
            "pixels": portraits.PortraitPixels(),
        }

    def generated(
        self, parts: dict[str, Any], faces: Any, weight: float, text: str = "", steps: int = 6, cfg: float = 1.0
    ) -> torch.Tensor:
        """[1, 128, 128, 3] of the person in `faces`, by our nodes and ComfyUI's sampler."""
        import comfy.sample
        from hotpath.nodes import NODE_CLASS_MAPPINGS
        from hotpath.patches.instantid import identity_of_faces

        model, positive, negative, *_ = NODE_CLASS_MAPPINGS["HotpathInstantID"]().apply(
            instantid=parts["adapter"], identity=identity_of_faces([faces], "one"), model=parts["model"],
            positive=portraits.encode_text(text), negative=portraits.encode_text(""), weight=weight, cn_strength=0.8,
            start_at=0.0, end_at=1.0, noise=0.0, combine_embeds="average", pose=True,
            face_tokens_for="IdentityNet only", patch_mode="full", custom_blocks="", control_net=parts["control_net"],
        )  # fmt: skip
        latent = torch.zeros(1, 4, SIDE // 8, SIDE // 8)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
        done = comfy.sample.sample(
            model, noise, steps, cfg, "euler", "normal", positive, negative, latent, disable_pbar=True, seed=3
        )
        return parts["pixels"].decode(done)

    def test_a_network_that_adds_nothing_has_no_weights(self):
        network = portraits.load_identity_net(trained=False).control_model
        assert not any(weight.any() for weight in network.state_dict().values())

    def test_the_hint_block_lays_the_drawing_into_channels(self):
        network = portraits.make_control_net()
        with torch.no_grad():
            for weight in network.input_hint_block.parameters():
                weight.fill_(torch.nan)  # as what was in memory before can be
        portraits.set_hint_block(network.input_hint_block)
        assert not any(weight.any() for weight in network.input_hint_block[-1].parameters())
        hint = x = torch.rand(1, 3, 64, 64)
        with torch.inference_mode():
            for layer in list(network.input_hint_block)[:-1]:
                x = layer(x)
            assert torch.allclose(x[:, :48], portraits.hint_features(hint), atol=1e-4)
            assert not x[:, 48:].any()

    @pytest.mark.long
    def test_the_face_becomes_the_given_one_as_the_weight_rises(self, parts, analyser):
        alike: dict[float, list[float]] = {0.0: [], 0.9: []}
        off = []
        for person in people(3):
            (given,) = found(analyser, drawn(person))
            for weight, cosines in alike.items():
                (got,) = found(analyser, self.generated(parts, given, weight, "grey background"))
                if not len(got):
                    cosines.append(0.0)
                    continue
                cosines.append(float(normalize(given.embeddings) @ normalize(got.embeddings).t()))
                off.append(float((got.keypoints[0] * 4 - given.keypoints[0]).abs().mean()) / (4 * 64))
        without, with_it = (float(np.mean(c)) for c in alike.values())
        assert with_it > without + 0.1, alike
        assert with_it > 0.4, alike
        assert len(off) >= 5 and np.mean(off) < 0.04, "eyes, nose and mouth are where the key points say"

    @pytest.mark.long
    def test_words_choose_the_background(self, parts, analyser):
        (given,) = found(analyser, drawn(people(1)[0]))
        for colour in ("red", "blue"):
            picture = self.generated(parts, given, 0.9, f"white shirt, {colour} background")
            corner = picture[0, :20, :20].mean((0, 1)) * 255
            distance = {name: float((corner - torch.tensor(rgb)).norm()) for name, rgb in portraits.COLOURS.items()}
            assert min(distance, key=distance.get) == colour, distance
