"""Settings of models that an older transformers passes over without a word."""

from __future__ import annotations

from typing import Any

from .errors import install


def misread(config: dict[str, Any]) -> str:
    """Why the installed transformers would read a model's `config` wrongly, with the cure; '' where it does not.

    Release 5 writes rope_theta into rope_parameters. Release 4 looks for it beside them, and goes on with the default,
    10000 where Qwen3 was trained with a million: worse answers and other pictures, and no error (vllm #42624).
    """
    import transformers

    release = str(transformers.__version__)
    if not release.startswith("4."):
        return ""
    for part in (config, config.get("text_config")):
        rope = part.get("rope_parameters") if isinstance(part, dict) else None
        if isinstance(part, dict) and isinstance(rope, dict) and "rope_theta" in rope and "rope_theta" not in part:
            return (
                f"was saved by transformers 5, and the {release} that is installed would give its words other positions: "
                f"update it with {install('--upgrade transformers')}."
            )
    return ""
