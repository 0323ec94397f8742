"""Profiles apply what they say; every key of a file does something, and what is not known is refused by name."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hotpath.cache import named_cache
from hotpath.patches import speed_profile_files, speed_profiles
from hotpath.patches.attention_override import override_of
from hotpath.patches.compilation import compiler_of
from hotpath.patches.speed_profile_files import (
    PARTS,
    ProfileError,
    load_profile,
    parse_file,
    parse_section,
    source_fingerprint,
)
from hotpath.patches.speed_profiles import CACHE_NAMES, MIB, PROFILES, apply_profile
from tiny_native_models import tiny

EXAMPLE = Path(__file__).resolve().parent.parent / "hotpath.example.yaml"


@pytest.fixture(autouse=True)
def inference(monkeypatch: pytest.MonkeyPatch) -> Any:
    with torch.inference_mode():
        yield


@pytest.fixture
def no_compiler_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = speed_profiles.compile_model
    monkeypatch.setattr(speed_profiles, "compile_model", lambda model, settings: real(model, settings, backend="eager"))


@pytest.fixture
def same_cache_limits() -> Any:
    before = {name: named_cache(name, 1 << 28).limit for name in CACHE_NAMES.values()}
    yield
    for name, limit in before.items():
        named_cache(name, limit).resize(limit)


def test_the_example_shows_every_key_and_the_built_in_profiles() -> None:
    sections = parse_file(EXAMPLE)
    for name, profile in PROFILES.items():
        assert sections[name] == profile
    import yaml

    shown = yaml.safe_load(EXAMPLE.read_text())["everything explained"]
    assert {part: set(keys) for part, keys in shown.items()} == {part: set(keys) for part, (_, keys) in PARTS.items()}
    from hotpath.colorization.networks import _CACHE_BYTES
    from hotpath.face.remembering import RESULTS_LIMIT
    from hotpath.identity.prepared import CACHE_BYTES
    from hotpath.text_to_image.prompts import MEMORY_LIMIT
    from hotpath.vision_language.embeddings import MEMORY_LIMIT as EMBEDDINGS

    usual = (MEMORY_LIMIT, EMBEDDINGS, CACHE_BYTES, RESULTS_LIMIT, _CACHE_BYTES)
    assert [shown["caches"][key] * MIB for key in CACHE_NAMES] == list(usual), "as if the part were not there"


def test_every_key_belongs_to_a_field() -> None:
    for kind, checks in PARTS.values():
        assert set(checks) == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"attenton": {}}, "mine has no key 'attenton'; the keys are attention, compile"),
        ({"compile": {"modus": "default"}}, r"mine\.compile has no key 'modus'; the keys are mode, regions"),
        ({"compile": {"mode": "fast"}}, r"mine\.compile\.mode is 'fast'; allowed are none, default"),
        ({"compile": {"dynamic": "yes"}}, "dynamic is 'yes'; allowed are true and false"),
        ({"compile": {"captured_sizes": 0}}, "whole numbers from 1 to 64"),
        ({"compile": {"captured_sizes": True}}, "whole numbers from 1 to 64"),
        ({"attention": {"backend": "flash9"}}, "allowed are none, auto, sage"),
        ({"attention": "auto"}, "mine.attention is 'auto', and must be keys with values"),
        ({"precision": {"scheme": "fp4"}}, "allowed are none, fp8"),
        ({"precision": {"exclude": "final_layer"}}, "a list of layer names"),
        ({"warmup": {"sizes": ["1024"]}}, "'1024' is no size"),
        ({"warmup": {"cfg": -1}}, "numbers from 0 to 100"),
        ({"caches": {"faces_mib": -1}}, "whole numbers from 0"),
        ([], r"hotpath\.yaml: mine is \[\]"),
    ],
)
def test_wrong_keys_and_values_are_refused_with_what_is_allowed(section: Any, said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        parse_section("mine", section)


def test_files_are_found_in_known_folders_only(headless_host: Any) -> None:
    folder = headless_host.input_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hotpath.yaml").write_text("quick:\n  compile: {mode: default}\n")
    (folder.parent / "outside.yaml").write_text("quick: {}\n")
    assert load_profile("quick").compile.mode == "default"
    before = source_fingerprint("hotpath.yaml")
    (folder / "hotpath.yaml").write_text("quick:\n  compile:\n    mode:\n  attention: {backend: }\n")
    assert (load_profile("quick").compile.mode, load_profile("quick").attention.backend) == ("none", "none")
    assert source_fingerprint("hotpath.yaml") != before
    with pytest.raises(ProfileError, match="no section 'slow'; it has quick"):
        load_profile("slow")
    for name in ("../outside.yaml", str(folder.parent / "outside.yaml"), "missing.yaml"):
        with pytest.raises(ProfileError, match=r"Copy hotpath\.example\.yaml"):
            load_profile("quick", name)
        assert source_fingerprint(name) == ""
    (folder / "broken.yaml").write_text("a: [1,\n")
    with pytest.raises(ProfileError, match=r"broken\.yaml is no YAML"):
        load_profile("a", "broken.yaml")
    (folder / "empty.yaml").write_text("")
    with pytest.raises(ProfileError, match="has no sections"):
        load_profile("a", "empty.yaml")


def applied(section: dict[str, Any], name: str = "flux") -> tuple[Any, str]:
    return apply_profile(tiny(name).model, parse_section("mine", section))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("fast:\n  compile:\n    mode: default\n    mode: none\n", "'mode' is there twice"),
        ("fast:\n  compile: {mode: default}\n  compile: {dynamic: false}\n", "'compile' is there twice"),
        ("fast: {}\nfast: {}\n", "'fast' is there twice"),
        ("fast: {}\n".encode("utf-16"), "is not in UTF-8"),
        ("[" * 5000, "is no YAML"),
        (b"\xef\xbb\xbffast: {}\n", None),
        ("a: &a {compile: {mode: default}}\nb: {<<: *a}\n", None),
        ("a: &a {compile: {}}\nb: {<<: *a, compile: {}, compile: {}}\n", "'compile' is there twice"),
    ],
)
def test_a_file_is_read_whole_or_refused(tmp_path: Path, content: str | bytes, said: str | None) -> None:
    path = tmp_path / "hotpath.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    if said is None:
        assert parse_file(path)
        return
    with pytest.raises(ProfileError, match=said):
        parse_file(path)


def test_a_file_of_another_kind_is_not_read(headless_host: Any) -> None:
    """A film of gigabytes, or the settings of somebody else, which a message would quote."""
    folder = headless_host.input_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text('{"key": "secret"}')
    with pytest.raises(ProfileError, match=r"must end in \.yaml or \.yml"):
        load_profile("key", "settings.json")
    (folder / "film.yaml").write_bytes(bytes(speed_profile_files.MAX_BYTES + 1))
    with pytest.raises(ProfileError, match="larger than 256 KiB"):
        load_profile("key", "film.yaml")


ALIASES = ", ".join(["&a0 [x, x]", *(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))])
MERGES = "".join(f"k{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"mine: [{ALIASES}]\n", "must be keys with values"),
        (f"mine: {{warmup: {{sizes: [{ALIASES}]}}}}\n", "allowed are sizes"),
        (f"k0: &a0 {{x: 1}}\n{MERGES}", "k0 has no key 'x'"),
        ("mine: 2000-99-99\n", "month must be in"),
        (f"mine: 0x{'f' * 5000}\n", "a number without end, and must be keys"),
    ],
)
def test_a_short_file_that_would_fill_the_memory(tmp_path: Path, content: str, said: str) -> None:
    """Aliases of aliases, which double forty times."""
    (tmp_path / "hotpath.yaml").write_text(content)
    with pytest.raises(ProfileError, match=said) as refused:
        parse_file(tmp_path / "hotpath.yaml")
    assert len(str(refused.value)) < 2000


def test_what_a_merge_brings_along_is_no_key_written_twice(tmp_path: Path) -> None:
    """Also where the merged mapping merges itself and lies deeper than the one that asks for it first."""
    import yaml

    text = "a: &a {mode: 1, batch: 1}\nb: {c: &c {<<: *a, mode: 2}}\nd: {<<: *c, batch: 3}\n"
    assert yaml.load(text, speed_profile_files._loader())["d"] == {"mode": 2, "batch": 3}
    (tmp_path / "hotpath.yaml").write_text(
        "far: &far {compile: {mode: default, strict: true}, warmup: {batch: 2}}\n"
        "middle: &middle {<<: *far, compile: {mode: none}}\n"
        "near: {<<: *middle, attention: {backend: auto}}\n"
    )
    near = parse_file(tmp_path / "hotpath.yaml")["near"]
    assert (near.compile.mode, near.warmup.batch, near.attention.backend) == ("none", 2, "auto")


@pytest.mark.parametrize("name", ["a\0b.yaml", "x" * 5000 + ".yaml", "../../etc/passwd.yaml"])
def test_a_name_that_no_file_has_is_not_found(headless_host: Any, name: str) -> None:
    with pytest.raises(ProfileError, match="There is no"):
        load_profile("fast", name)
    assert source_fingerprint(name) == ""


@pytest.mark.comfy
def test_an_empty_section_changes_nothing() -> None:
    bench = tiny("flux")
    model, report = applied({})
    assert compiler_of(model) is None and override_of(model) is None
    assert report == "Speed profile: mine"
    assert torch.equal(bench.sample(model, steps=1), bench.sample(steps=1))


@pytest.mark.comfy
def test_attention_keys_choose_the_backend() -> None:
    model, report = applied({"attention": {"backend": "sdpa_math", "strict": True}})
    policy = override_of(model).policy
    assert (policy.backend, policy.strict) == ("sdpa_math", True)
    assert "attention: " in report
    assert override_of(applied({"attention": {"backend": "sdpa_math"}})[0]).policy.strict is False


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mode", "max-autotune-no-cudagraphs"),
        ("regions", "transformer blocks"),
        ("dynamic", False),
        ("strict", True),
        ("captured_sizes", 7),
    ],
)
def test_compile_keys_reach_the_compiler(key: str, value: Any, no_compiler_needed: None) -> None:
    model, _ = applied({"compile": {"mode": "default"}})
    assert getattr(compiler_of(model).settings, key) != value
    model, report = applied({"compile": {"mode": "default", key: value}})
    assert getattr(compiler_of(model).settings, key) == value
    assert "compile: " in report


@pytest.mark.comfy
def test_precision_keys_choose_scheme_and_layers() -> None:
    def quantised(model: Any) -> set[str]:
        weights = model.model.diffusion_model.named_parameters()
        return {name for name, weight in weights if type(weight.data) is not torch.Tensor}

    model, report = applied({"precision": {"scheme": "fp8_weights"}})
    every = quantised(model)
    assert any("double_blocks" in name for name in every) and "precision: " in report
    model, _ = applied({"precision": {"scheme": "fp8_weights", "exclude": ["double_blocks", "*embed*", "final_layer"]}})
    assert quantised(model) and not any("double_blocks" in name for name in quantised(model))
    assert not quantised(tiny("flux").model)


@pytest.mark.comfy
def test_a_scheme_that_cannot_be_had_is_left_out_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise speed_profiles.PrecisionUnavailable("no GPU for fp8")

    monkeypatch.setattr(speed_profiles, "set_precision", missing)
    monkeypatch.setattr(speed_profiles, "slow_on_a_cpu", lambda _: "")
    _, report = applied({"precision": {"scheme": "fp8"}})
    assert "precision: left out: no GPU for fp8" in report
    with pytest.raises(speed_profiles.PrecisionUnavailable):
        applied({"precision": {"scheme": "fp8", "strict": True}})


@pytest.mark.comfy
def test_on_a_cpu_nothing_is_taken_that_is_slower_than_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    model = tiny("flux").model
    if model.load_device.type != "cpu":
        pytest.skip("asks what a CPU does")
    monkeypatch.setattr(speed_profiles, "set_precision", lambda m, scheme, _: (asked.append(scheme), (m, "taken"))[1])

    def report(**section: Any) -> str:
        return apply_profile(model, parse_section("mine", {"precision": section}))[1]

    monkeypatch.setattr("hotpath.patches.precision.schemes.why_not", lambda: "")
    assert "int8 and not fp8, because a CPU has no products" in report(scheme="fp8")
    assert "not" not in report(scheme="int8") + report(scheme="fp8_weights") + report(scheme="fp8", strict=True)
    assert asked == ["int8", "int8", "fp8_weights", "fp8"]
    monkeypatch.setattr("hotpath.patches.precision.schemes.why_not", lambda: "its products overflow")
    for scheme in ("fp8", "int8"):
        assert "left out: int8 would be slower than the model as it is, because" in report(scheme=scheme)
    assert "left out: int8_rotated would be slower" in report(scheme="int8_rotated")
    assert "not" not in report(scheme="int8_weights") and asked[4:] == ["int8_weights"]


@pytest.mark.comfy
def test_one_part_that_cannot_be_had_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tiny("flux")
    model = bench.model.clone()
    # From a loader that cannot load it without.
    monkeypatch.setattr(type(model), "is_dynamic", lambda self: True, raising=False)
    monkeypatch.setattr(model, "cached_patcher_init", None, raising=False)
    monkeypatch.setattr("hotpath.patches.compilation.compiler_problem", lambda device: None)
    config = model.model.model_config
    widths = {key: value for key, value in config.unet_config.items() if key != "context_in_dim"}
    monkeypatch.setattr(config, "unet_config", widths)
    monkeypatch.setattr("hotpath.patches.warmup.PROMPT_LAYERS", ())  # as of HiDream, which reads several prompts
    section = {"attention": {"backend": "auto"}, "compile": {"mode": "default"}, "warmup": {"sizes": ["64x64"]}}
    made, report = apply_profile(model, parse_section("mine", section))
    assert override_of(made).policy.backend == "auto" and compiler_of(made) is None
    assert "compile: left out: This MODEL is under DynamicVRAM" in report
    assert "warm-up: left out: What prompts of Flux look like" in report
    with pytest.raises(ValueError, match="DynamicVRAM"):
        apply_profile(model, parse_section("mine", {"compile": {"mode": "default", "strict": True}}))


@pytest.mark.comfy
def test_warmup_keys_run_sizes_batches_and_cfg(monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.sample

    seen = []
    real = comfy.sample.sample

    def watched(model: Any, noise: torch.Tensor, steps: int, cfg: float, *args: Any, **kwargs: Any) -> Any:
        seen.append((tuple(noise.shape), cfg))
        return real(model, noise, steps, cfg, *args, **kwargs)

    monkeypatch.setattr(comfy.sample, "sample", watched)
    _, report = applied({"warmup": {"sizes": ["64x128"], "batch": 2, "cfg": 3}})
    assert seen == [((2, 16, 16, 8), 3.0)]
    assert "warm-up: " in report and "64x128" in report


@pytest.mark.comfy
@pytest.mark.parametrize("key", CACHE_NAMES)
def test_cache_keys_limit_their_cache(key: str, same_cache_limits: None) -> None:
    before = {name: named_cache(name, 1).limit for name in CACHE_NAMES.values()}
    _, report = applied({"caches": {key: 3}})
    for other, name in CACHE_NAMES.items():
        assert named_cache(name, 1).limit == (3 * MIB if other == key else before[name])
    assert f"{CACHE_NAMES[key]} 3 MiB" in report


@pytest.mark.comfy
def test_cache_names_are_those_the_families_use() -> None:
    root = Path(__file__).resolve().parent.parent
    used = "".join(path.read_text("utf-8") for folder in ("text_to_image", "vision_language", "identity", "face", "colorization")
                   for path in (root / folder).rglob("*.py"))  # fmt: skip
    assert all(f'named_cache("{name}"' in used for name in CACHE_NAMES.values())


@pytest.mark.comfy
@pytest.mark.parametrize("name", PROFILES)
def test_built_in_profiles_keep_the_picture(name: str, no_compiler_needed: None, same_cache_limits: None) -> None:
    bench = tiny("z_image")
    model, report = apply_profile(bench.model, PROFILES[name])
    assert report.startswith(f"Speed profile: {name}")
    made, expected = bench.sample(model), bench.sample()
    error = (made - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    lossy = "precision: " in report and "left out" not in report
    assert error < (0.15 if lossy else 1e-5)
    assert override_of(model).policy.backend == "auto"
    assert torch.equal(bench.sample(), expected)


@pytest.mark.comfy
def test_the_node_applies_profiles_and_files(headless_host: Any, no_compiler_needed: None) -> None:
    from hotpath.nodes import NODE_CLASS_MAPPINGS as nodes

    node = nodes["HotpathSpeedProfile"]
    headless_host.input_folder().mkdir(parents=True, exist_ok=True)
    file = headless_host.input_folder() / "hotpath.yaml"
    file.write_text("mine:\n  attention: {backend: sdpa_math}\n")
    model, report = node().apply(tiny("flux").model, "hotpath.yaml", "mine")
    assert override_of(model).policy.backend == "sdpa_math" and "mine" in report
    before = node.IS_CHANGED(model=None, profile="hotpath.yaml", section="mine")
    file.write_text("mine:\n  attention: {backend: auto}\n")
    assert node.IS_CHANGED(model=None, profile="hotpath.yaml", section="mine") != before
    assert node.IS_CHANGED(model=None, profile="balanced") == "" == node.IS_CHANGED("balanced", None)
    assert node.IS_CHANGED("hotpath.yaml") == node.IS_CHANGED("hotpath.yaml", "hotpath.yaml") != ""
    for linked in ({"profile": None}, {"profile": "hotpath.yaml", "file": None}):
        assert math.isnan(node.IS_CHANGED(model=None, **linked)), "what another node says is not told here"
