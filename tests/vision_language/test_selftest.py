"""`hotpath selftest` and `hotpath caption` on the demo captioner."""

from __future__ import annotations

import json

import numpy as np
from hotpath.cli import main
from hotpath.demo import train_captioner

MODELS_FOLDER = train_captioner.FOLDER.parents[1]


def test_the_demo_captioner_passes(capsys):
    assert main(["selftest", "vision", "--models", str(MODELS_FOLDER), "--device", "cpu", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    # Its folder, and its GGUF file: one token, and a known picture.
    assert len(result["findings"]) == 4


def test_a_path_that_computes_something_else_fails(capsys, monkeypatch):
    from hotpath.vision_language import decoding

    monkeypatch.setattr(decoding, "rotate", lambda x, cos, sin: x)
    assert main(["selftest", "vision", "--models", str(MODELS_FOLDER), "--device", "cpu"]) == 1


def test_caption(tmp_path, capsys):
    drawings = [train_captioner.draw(np.random.default_rng(600 + i)) for i in range(3)]
    for index, drawing in enumerate(drawings):
        drawing.picture.save(tmp_path / f"{index}.png")
    command = [
        "caption",
        str(tmp_path),
        "--model",
        "hotpath-captioner",
        "--models",
        str(MODELS_FOLDER),
        "--device",
        "cpu",
    ]
    command += ["--prompt", "Describe this image.", "--max-new-tokens", "16", "--before", "toy, "]
    assert main(command) == 0
    assert [(tmp_path / f"{i}.txt").read_text() for i in range(3)] == [f"toy, {d.caption}" for d in drawings]
    assert "3 captioned" in capsys.readouterr().out
    # What is done, or can never be, is told without the model.
    absent = [*command[:3], "no-such-model", *command[4:]]
    assert main(absent) == 0
    assert "3 skipped" in capsys.readouterr().out
    assert main([*absent, "--prompt", " ", "--overwrite"]) == 2
    assert "prompt is empty" in capsys.readouterr().err
    (tmp_path / "file").write_bytes(b"")
    assert main([*absent, "--captions-to", str(tmp_path / "file")]) == 2
    assert "No caption can be written into" in capsys.readouterr().err
    (tmp_path / "broken.png").write_bytes(b"x")
    assert main(command) == 1
    assert "broken.png" in capsys.readouterr().out
    assert main([*command[:1], str(tmp_path / "absent"), *command[2:]]) == 2
    assert "no folder" in capsys.readouterr().err
