"""What to tell of an error that a library raised: libraries write pages, a report has room for a line."""

from __future__ import annotations


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of what `error` says, at most so many letters; the name of its kind when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def kind_and_line(error: BaseException, most: int = 160) -> str:
    """The kind of `error` and the first line of what it says; of what a compiler's backend raised, inside torch's own."""
    error = getattr(error, "inner_exception", None) or error
    kind, said = type(error).__name__, first_line(error, most)
    return kind if said == kind else f"{kind}: {said}"
