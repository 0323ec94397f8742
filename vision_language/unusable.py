"""The error of models that cannot be used."""

from __future__ import annotations


class UnusableModel(ValueError):
    """A model that cannot be used; the message names it, what is wrong and the cure."""
