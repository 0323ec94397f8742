"""Whether an item or its worker is to blame: a worker whose items fail one after the other is asked about by another.

A worker with something broken fails at once what others finish, is free again first, and would go through the whole list.
So the next item it fails is run by another before it is recorded, and the worker gets none until that is known.
"""

from __future__ import annotations

from dataclasses import dataclass

IN_A_ROW = 3  # items that a worker fails one after the other, until another one is asked


@dataclass
class _Record:
    """failed: items in a row. patience: how many of them until another worker is asked. replaced: it was to blame once."""

    failed: int = 0
    patience: int = IN_A_ROW
    replaced: bool = False


class SecondOpinions:
    """What is asked about the workers of a run, by their slots."""

    def __init__(self, slots: int) -> None:
        self._records = [_Record() for _ in range(slots)]
        self._asked: dict[str, int] = {}  # the worker that is in doubt, by the job that another one runs now

    def in_doubt(self, slot: int) -> bool:
        return slot in self._asked.values()

    def failed(self, slot: int, job_id: str, others: bool) -> bool:
        """A job failed by itself; whether another worker is to run it before that is believed. others: there is one."""
        if (first := self._asked.pop(job_id, None)) is not None:
            # Both say so: it is the item, and of such a list not every third is run twice.
            self._records[first].failed = 0
            self._records[first].patience *= 2
            return False
        record = self._records[slot]
        record.failed += 1
        if not others or record.failed < record.patience:
            return False
        self._asked[job_id] = slot
        return True

    def done(self, slot: int, job_id: str) -> int | None:
        """A job was done; the slot whose worker is to blame for having failed it, if one has."""
        self._records[slot].failed = 0
        return self._asked.pop(job_id, None)

    def replaced_before(self, slot: int) -> bool:
        """Whether the worker that is to blame is there in place of another that was; the next failure is asked about."""
        record = self._records[slot]
        before, record.replaced = record.replaced, True
        record.failed, record.patience = IN_A_ROW - 1, IN_A_ROW
        return before

    def forget(self, job_id: str) -> None:
        """A job ended in another way, which says nothing about the worker."""
        self._asked.pop(job_id, None)
