"""Nodes that count how often they ran, and behave in every way that an executor has to know."""

from __future__ import annotations

from typing import Any, ClassVar


class Counted:
    """Counts its calls by class, so that tests see what ran."""

    calls: ClassVar[list[str]] = []
    RETURN_TYPES = ("INT",)
    FUNCTION = "work"


class Number(Counted):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {})}}

    def work(self, value):
        Counted.calls.append(f"Number {value}")
        return (value,)


class Add(Counted):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {}), "b": ("INT", {})}}

    def work(self, a, b):
        Counted.calls.append(f"Add {a} {b}")
        return (a + b,)


class Numbers(Counted):
    OUTPUT_IS_LIST = (True,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"count": ("INT", {})}}

    def work(self, count):
        return (list(range(count)),)


class Sum(Counted):
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"values": ("INT", {}), "plus": ("INT", {})}}

    def work(self, values, plus):
        return (sum(values) + plus[0],)


class Choose(Counted):
    """Takes one of two lazy inputs."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"first": ("BOOLEAN", {})},
            "optional": {"a": ("INT", {"lazy": True}), "b": ("INT", {"lazy": True})},
        }

    def check_lazy_status(self, first, a=None, b=None):
        name, value = ("a", a) if first else ("b", b)
        return [name] if value is None else []

    def work(self, first, a=None, b=None):
        Counted.calls.append("Choose")
        return (a if first else b,)


class Clock(Counted):
    now: ClassVar[Any] = 0

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls):
        if isinstance(cls.now, Exception):
            raise cls.now
        return cls.now

    def work(self):
        Counted.calls.append("Clock")
        return (7,)


class Fails(Counted):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {})}}

    def work(self, a):
        raise ValueError(f"{a} is no good; use another number.")


class Show(Counted):
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"a": ("INT", {})},
            "hidden": {"id": "UNIQUE_ID", "prompt": "PROMPT", "extra": "EXTRA_PNGINFO"},
        }

    def work(self, a, id=None, prompt=None, extra=None):
        Counted.calls.append(f"Show {a}")
        assert prompt[id]["class_type"] == "Show" and extra is None
        return {"ui": {"text": [f"{id}: {a}"]}}


class Talks(Counted):
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {})}}

    def work(self, a):
        from hotpath import host

        host.current().show_text("working")
        host.current().show_text(f"report {a}")
        return (a,)


class Stops(Counted):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {})}}

    def work(self, a):
        from hotpath import host

        with host.tracked(host.current(), 10) as bar:
            for i in range(10):
                if i == 3:
                    host.current().stop()
                bar.update()
        raise AssertionError("was not stopped")


class Waits(Counted):
    async def work(self, a):
        return (a + 1,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {})}}


class Grows(Counted):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {})}}

    def work(self, a):
        return {"expand": {}, "result": (a,)}


CATALOG = {c.__name__: c for c in (Number, Add, Numbers, Sum, Choose, Clock, Fails, Show, Talks, Stops, Waits, Grows)}
