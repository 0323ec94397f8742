"""Makes the API twins of the example workflows, as the front end would export them.

    python tests/make_example_files.py              write every twin
    python tests/make_example_files.py --run NAME   also run the examples with NAME in their name, and say what they said

A workflow is edited in ComfyUI and saved in example_workflows/; its twin lies in example_workflows/api/. Thumbnails come
from `python -m hotpath.demo.thumbnails`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "support")]

import conftest  # noqa: E402  registers the checkout as `hotpath`

from example_workflows import EXAMPLES, demo_server, get, run_example, twin_of, twin_path  # noqa: E402


def main(arguments: list[str]) -> int:
    assert conftest.COMFYUI is not None, "a ComfyUI is needed: set COMFYUI_PATH"
    words = [argument for argument in arguments if argument != "--run"]
    with tempfile.TemporaryDirectory() as work, demo_server(conftest.COMFYUI, Path(work)) as server:
        info = get(server, "/object_info")
        for path in EXAMPLES:
            twin = json.dumps(twin_of(path, info), ensure_ascii=False, indent=1)
            twin_path(path).write_text(f"{twin}\n", encoding="utf-8")
            if "--run" in arguments and (not words or any(word in path.stem for word in words)):
                outcome = run_example(server, path, Path(work) / path.stem)
                said = [f"    {node}: {text[:200]!r}" for node, text in outcome.texts]
                sys.stdout.write("\n".join([f"{path.stem} {outcome.seconds:.1f} s", *said, ""]))
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
