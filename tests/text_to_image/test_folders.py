"""Folders that are not what they should be are refused in a sentence, before anything is loaded."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from hotpath import host
from hotpath.demo.z_image_model import write_checkpoint
from hotpath.host import ModelNotFound
from hotpath.text_to_image import folders
from hotpath.text_to_image.folders import UnusableCheckpoint
from hotpath.text_to_image.jobs import adapter_file
from hotpath.text_to_image.loading import MODELS, require_libraries
from safetensors.torch import load_file, save_file


@pytest.fixture
def copy(folder, tiny_folder):
    """The tiny checkpoint as a folder of its own, to be damaged."""
    shutil.copytree(tiny_folder, folder / "copy")
    return folder / "copy"


def edit(file, **changes):
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**settings, **changes}.items() if v is not None}))


def test_what_is_offered(folder, copy):
    shutil.copytree(copy, folder / "owner" / "deep")
    edit(copy / "model_index.json", _class_name="StableDiffusionPipeline")
    (folder / ".hidden").mkdir()
    shutil.copy(folder / "tiny" / "model_index.json", folder / ".hidden")
    assert folders.scan() == ["owner/deep", "tiny"]
    assert folders.find("owner/deep").pipeline == "ZImagePipeline"


def test_whatever_a_tokenizer_reads_is_part_of_its_identity(copy):
    """A prompt's states are remembered by it: vocabulary files of the older layout count as well."""
    found = {folders.find("copy").identity("tokenizer")}
    for name in ("added_tokens.json", "special_tokens_map.json", "merges.txt", "chat_template.jinja"):
        (copy / "tokenizer" / name).write_text("{}")
        found.add(folders.find("copy").identity("tokenizer"))
    assert len(found) == 5
    (copy / "tokenizer" / "README.md").write_text("x")
    assert folders.find("copy").identity("tokenizer") in found


def test_names_do_not_lead_out(folder, tiny_folder):
    for name in ("../diffusers/tiny", str(tiny_folder), "C:/tiny", "tiny/../../x"):
        with pytest.raises(host.ModelNotFound, match="not a folder inside the model paths"):
            folders.find(name)
    assert folders.find(str(tiny_folder), anywhere=True).path == tiny_folder
    with pytest.raises(host.ModelNotFound, match=r"was not found\. Looked in"):
        folders.find("other")
    with pytest.raises(host.ModelNotFound, match="No checkpoint is chosen"):
        folders.find(" ")


def test_siblings_with_the_same_networks(copy):
    for name in ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"):
        edit(copy / "model_index.json", _class_name=name)
        assert folders.find("copy").pipeline == name


DAMAGES = {
    "another pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline, not of the Z-Image family"),
    "a pipeline for pictures": (
        lambda f: edit(f / "model_index.json", _class_name="ZImageOmniPipeline"), "draws from reference pictures"),
    "another transformer": (
        lambda f: edit(f / "model_index.json", transformer=["diffusers", "FluxTransformer2DModel"]),
        "names FluxTransformer2DModel as transformer"),
    "a class of its own": (
        lambda f: edit(f / "model_index.json", text_encoder=["my_code", "Encoder"]), "names Encoder as text_encoder"),
    "no component": (lambda f: edit(f / "model_index.json", vae=None), "names nothing as vae"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
    "a broken index": (lambda f: (f / "model_index.json").write_text("{"), "cannot be read as JSON"),
    "no folder": (lambda f: shutil.rmtree(f / "vae"), "has no folder vae"),
    "no configuration": (lambda f: (f / "transformer" / "config.json").unlink(), "config.json is missing"),
    "no weights": (
        lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "has no weights"),
    "pickles": (
        lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").rename(f / "vae" / "diffusion_pytorch_model.bin"),
        "a pickle, which can run code and is not opened"),
    "no tokenizer": (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "has no tokenizer"),
    "no chat template": (
        lambda f: ((f / "tokenizer" / "chat_template.jinja").unlink(),
                   edit(f / "tokenizer" / "tokenizer_config.json", chat_template=None)), "has no chat template"),
    "a chat template that no tokenizer reads": (
        lambda f: ((f / "tokenizer" / "chat_template.jinja").rename(f / "tokenizer" / "chat_template.json"),
                   edit(f / "tokenizer" / "tokenizer_config.json", chat_template=None)), "has no chat template"),
    "another draw each time": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", stochastic_sampling=True), "stochastic sampling"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(copy, damage):
    break_it, words = DAMAGES[damage]
    break_it(copy)
    with pytest.raises(UnusableCheckpoint, match=words):
        MODELS.get("copy")


def test_positions_that_an_older_library_passes_over(copy, monkeypatch):
    """A text encoder that transformers 5 saved gets other ones from 4.57: another picture, and no error."""
    import transformers

    file = copy / "text_encoder" / "config.json"
    edit(file, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(UnusableCheckpoint, match=r"text_encoder was saved by transformers 5, and the 4\.57\.6 that is"):
        MODELS.get("copy")
    edit(file, rope_theta=1e6, rope_parameters=None)
    MODELS.get("copy")


def test_a_missing_and_a_cut_shard(folder):
    path = write_checkpoint(folder / "shards", shard="150KB") / "transformer"
    shards = sorted(path.glob("*-of-*.safetensors"))
    assert len(shards) > 2
    MODELS.get("shards")
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    with pytest.raises(UnusableCheckpoint, match=f"{shards[1].name}: it has {len(whole) - 10} bytes"):
        MODELS.get("shards")
    shards[1].unlink()
    with pytest.raises(UnusableCheckpoint, match=f"is not whole, missing: {shards[1].name}"):
        MODELS.get("shards")


@pytest.mark.parametrize(
    "named", ["../../tiny.safetensors", "/tiny.safetensors", r"..\tiny.safetensors", "C:tiny", ".."]
)
def test_an_index_names_files_beside_it_only(copy, folder, named):
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, folder / "tiny.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(file), named)}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(UnusableCheckpoint, match="which is no file beside it"):
        folders.find("copy")


@pytest.mark.parametrize("weight_map", [None, {}, [1], 3])
def test_an_index_without_names_is_one_sentence(copy, weight_map):
    index = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UnusableCheckpoint, match="names no weight files"):
        folders.find("copy")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a\0b", "x" * 5000])
def test_what_can_be_no_path_is_not_found(folder, name):
    with pytest.raises(ModelNotFound):
        folders.find(name, anywhere=True)
    with pytest.raises(ModelNotFound):
        folders.find(name)
    if len(name) < 100:
        with pytest.raises(ModelNotFound):
            adapter_file(name)


@pytest.mark.parametrize("shard", ["150KB", "10GB"])
@pytest.mark.parametrize("variant", ["", "bf16"])
def test_shards_and_variants_draw_the_same(folder, draw, load, shard, variant):
    wanted = draw(load()).pictures
    path = write_checkpoint(folder / "other", shard=shard)
    for component, stem in folders.WEIGHTS.items() if variant else ():
        for file in (path / component).glob(f"{stem}*"):
            renamed = file.name.replace(f"{stem}.safetensors.index", f"{stem}.safetensors.index.{variant}")
            if file.name == f"{stem}.safetensors":
                renamed = f"{stem}.{variant}.safetensors"
            file.rename(file.with_name(renamed))
    assert set(folders.find("other").variants.values()) == {variant}
    # Not to the bit: where a weight lies in its file decides which of its instructions a CPU takes.
    assert (draw(load("other")).pictures - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("damage", ["missing", "shape", "strange"])
def test_weights_that_do_not_fit(copy, draw, component, damage):
    """The libraries would fill in random numbers and go on."""
    file = copy / component / f"{folders.WEIGHTS[component]}.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "layers.0" in n or "up_blocks.0" in n)
    tensor = tensors.pop(name)
    if damage == "shape":
        tensors[name] = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
    elif damage == "strange":
        tensors |= {name: tensor, "adapter.other.weight": tensor.clone()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnusableCheckpoint, match=str(copy / component)):
        draw(MODELS.get("copy"))


def test_a_sub_folder_and_a_single_file(folder, tiny_folder):
    with pytest.raises(UnusableCheckpoint, match="choose the folder above it"):
        folders.find("tiny/transformer")
    (folder / "z.safetensors").write_bytes(b"")
    with pytest.raises(UnusableCheckpoint, match="is a single file: load it with ComfyUI's Load Diffusion Model"):
        folders.find("z.safetensors")


def test_parts_of_two_checkpoints(copy):
    edit(copy / "vae" / "config.json", latent_channels=16)
    with pytest.raises(UnusableCheckpoint, match="draws 4 channels and the VAE reads 16"):
        MODELS.get("copy")


def test_a_folder_that_changed_is_another_model(copy, folder, load):
    before = load("copy")
    shutil.rmtree(copy)
    write_checkpoint(copy, seed=9)
    after = load("copy")
    assert after is not before and after.identity != before.identity and after.text_identity != before.text_identity
    # A renamed one is not.
    copy.rename(folder / "renamed")
    assert load("renamed").identity == after.identity


@pytest.mark.parametrize(("version", "enough"), [("0.38.0", False), ("0.39.0.dev0", True), ("1.0", True)])
def test_a_diffusers_that_draws_other_pictures_is_too_old(version, enough, monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", version)
    if enough:
        require_libraries()
    else:
        with pytest.raises(UnusableCheckpoint, match=r"diffusers 0\.39 .* newer \(diffusers 0\.38\.0 is installed\)"):
            require_libraries()
