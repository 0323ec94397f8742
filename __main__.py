"""`python -m hotpath` when installed, `python <checkout>` when not."""

from __future__ import annotations

import sys

if not __package__:  # run as `python <checkout>`: the folder itself is sys.path[0]
    import importlib.util
    from pathlib import Path

    root = Path(__file__).resolve().parent
    # Leave the folder off the path, so that `nodes` and `cache` stay ComfyUI's to name.
    sys.path.pop(0)
    spec = importlib.util.spec_from_file_location("hotpath", root / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hotpath"] = module
    spec.loader.exec_module(module)
    # Not a relative import: Python warns of one where __package__ is set by hand.
    main = importlib.import_module(".cli", module.__name__).main
else:
    from .cli import main

if __name__ == "__main__":
    sys.exit(main())
