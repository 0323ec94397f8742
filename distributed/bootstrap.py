"""Finds the pack from a bare process: a worker's first lines, run by path before there is a package to import from.

Inside ComfyUI the pack has a name made of its folder's path, which no other process knows; a worker gives it its own.
"""

import importlib.util
import sys
from pathlib import Path

NAME = "hotpath"


def load_pack(root: str) -> str:
    """Make the pack in the folder `root` importable as `hotpath`; returns that name.

    Raises ImportError when neither the folder nor an installed pack is there, as on a machine of a cluster without it.
    """
    if NAME in sys.modules:
        return NAME
    init = Path(root) / "__init__.py"
    if not init.is_file():
        if importlib.util.find_spec(NAME) is not None:
            return NAME
        raise ImportError(
            f"This worker finds Hotpath neither in {root} nor installed: install it there, or put it on shared storage."
        )
    spec = importlib.util.spec_from_file_location(NAME, init, submodule_search_locations=[root])
    if spec is None or spec.loader is None:
        raise ImportError(f"{init} cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return NAME


if __name__ == "__main__":
    # The checkout must stay off the path: its `nodes` and `cache` are also names that others use.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    importlib.import_module(load_pack(sys.argv[1]) + ".distributed.worker_process").main()
