"""The loop of a run on simulated workers: every job once, bounded, whatever dies; policies, retries, back-off."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hotpath.distributed.items import Item
from hotpath.distributed.jobs import Job
from hotpath.distributed.policy import POLICIES, LeastBusy, Random, RoundRobin, make_policy
from hotpath.distributed.pool import Died, Finished, Ready
from hotpath.distributed.retry import CONNECTION, DISK, ITEM, MEMORY, WORKER, RetryPlan, failure_kind, told_kind
from hotpath.distributed.scheduler import WITHOUT_ROOM, DiskFull, NoWorkers, Scheduler
from hotpath.distributed.second_opinions import IN_A_ROW
from hotpath.distributed.simulation import Cluster, CountingStore, SimulatedPool, simulate
from hotpath.distributed.status import Status
from hotpath.headless.executor import NodeFailed, RunResult
from hotpath.headless.graph import Node


class Rig:
    """A scheduler on simulated workers. answers: what a job gives instead of done, attempt by attempt."""

    def __init__(
        self, workers=2, seconds=1.0, policy="least_busy", retries=2, answers=None, depth=2, limit=None, **cluster
    ):
        self.answers = answers or {}
        self.pool = SimulatedPool(Cluster(workers, **cluster), lambda job_id: seconds, random.Random(0))
        self.store = CountingStore()
        self.status = Status(None, clock=self.pool.now)
        self.given: list[tuple[int, str]] = []
        self.attempts: list[tuple[str, int, float]] = []
        plan = RetryPlan(retries, rng=random.Random(1))
        self.scheduler = Scheduler(
            self.pool, self.store, make_policy(policy, random.Random(2)), plan, self.status, self, self.stop, depth,
            self.pool.now, limit,
        )  # fmt: skip
        self.stop_at = float("inf")
        self.most_known = 0
        submit, wait, renew = self.pool.submit, self.pool.wait, self.pool.renew
        idle: set[int] = set()

        def watched_submit(slot, payload):
            idle.remove(slot)  # one that has not started, or has a job, is given none
            self.given.append((slot, payload["id"]))
            self.attempts.append((payload["id"], payload["attempt"], self.pool.time))
            submit(slot, payload)

        def watched_wait(timeout):
            events = []
            for event in wait(timeout):
                if isinstance(event, Finished) and self.answers.get(event.job_id):
                    kind = self.answers[event.job_id].pop(0)
                    result = {"status": "failed", "kind": kind, "error": f"{kind} was wrong.", "seconds": 1.0}
                    event = Finished(event.slot, event.job_id, result)
                (idle.discard if isinstance(event, Died) else idle.add)(event.slot)
                events.append(event)
            return events

        def watched_renew(slot):
            idle.discard(slot)
            renew(slot)

        self.pool.submit, self.pool.wait, self.pool.renew = watched_submit, watched_wait, watched_renew

    def stop(self):
        if self.pool.time >= self.stop_at:
            raise KeyboardInterrupt

    def changed(self, status):
        self.most_known = max(self.most_known, self.scheduler.known)

    def run(self, count, twins=()):
        status = self.scheduler.run(jobs(count, twins))
        assert not status.running
        return status


def jobs(count: int, twins=()) -> Iterator[Job]:
    for i in range(count):
        yield Job(str(i), Item(f"label {i}", str(i)), {})
        if i in twins:
            yield Job(str(i), Item(f"twin of {i}", str(i)), {})


def test_workers_that_did_start_are_ended_when_one_cannot():
    rig, closed = Rig(), []

    def start():
        raise OSError("no more processes")

    rig.pool.start, rig.pool.close = start, lambda: closed.append(True)
    with pytest.raises(OSError, match="no more"):
        rig.run(1)
    assert closed == [True]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_job_once(policy):
    rig = Rig(workers=3, policy=policy)
    status = rig.run(40)
    assert sorted(rig.store.kept, key=int) == [str(i) for i in range(40)]
    assert status.done == 40 and not status.running and rig.scheduler.known == 0


def test_policies_choose_as_they_are_called():
    assert LeastBusy().choose([1, 0, 0], 2) == 1
    assert LeastBusy().choose([1, None, 2], 2) is None
    turn = RoundRobin()
    assert [turn.choose([0, None, 0], 2) for _ in range(4)] == [0, 2, 0, 2]
    assert turn.choose([2, 0, 0], 2) is None, "the next in turn is full: the job waits for it"
    lot = Random(random.Random(0))
    drawn = [lot.choose([0, 0, 0], 2) for _ in range(50)]
    assert set(drawn) == {0, 1, 2}
    assert Random(random.Random(0)).choose([None, None], 2) is None
    with pytest.raises(ValueError, match="choose one of least_busy, round_robin, random"):
        make_policy("best")


def test_a_million_items_are_never_held():
    """Memory does not grow with the number of items, and no more is pulled than workers can soon do."""

    def peak(count: int) -> int:
        rig = Rig(workers=4)
        rig.store.keep = lambda *_: None
        rig.given = rig.attempts = type("Nothing", (), {"append": lambda self, x: None})()
        tracemalloc.start()
        rig.run(count)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rig.most_known <= 4 * 2
        return found

    peak(200)
    assert peak(8000) < peak(800) + 40_000


def test_a_long_list_of_what_is_done_is_gone_through_without_waiting():
    rig = Rig(workers=1, seconds=1.0)
    rig.store.done = lambda job: job.id != "4999"
    status = rig.run(5000)
    assert (status.skipped, status.done) == (4999, 1)
    assert rig.pool.time < 2.0  # the one job, and not a turn's wait for every few items


def test_the_most_workers_that_were_there_are_known():
    rig = Rig(workers=3)
    rig.pool.start = lambda: rig.pool._after(0.0, 1, Ready(1))
    assert rig.run(4).peak == 1
    assert Rig(workers=3).run(4).peak == 3


def test_items_are_pulled_only_as_far_as_needed():
    pulled = 0

    def counted():
        nonlocal pulled
        for job in jobs(1000):
            pulled += 1
            yield job

    rig = Rig(workers=2)
    rig.stop_at = 10.0
    with pytest.raises(KeyboardInterrupt):
        rig.scheduler.run(counted())
    assert len(rig.store.kept) <= pulled <= len(rig.store.kept) + 2 * 2


def test_what_can_pass_is_tried_again_with_growing_waits():
    rig = Rig(workers=1, answers={"1": [CONNECTION, CONNECTION], "2": [ITEM], "3": [MEMORY]}, retries=2)
    status = rig.run(4)
    assert sorted(rig.store.kept) == ["0", "1", "3"]
    assert rig.store.failed == {"2": "item was wrong."}
    assert (status.done, status.failed, status.retried) == (3, 1, 3)
    times = [time for job, _, time in rig.attempts if job == "1"]
    waits = [after - before - 1.0 for before, after in pairwise(times)]
    assert waits[0] >= 0.5 and waits[1] >= 1.0
    assert [attempt for job, attempt, _ in rig.attempts if job == "1"] == [1, 2, 3]


def test_an_item_that_never_passes_is_recorded_with_its_sentence():
    rig = Rig(answers={"0": [CONNECTION] * 5}, retries=1)
    rig.run(3)
    assert rig.store.failed == {"0": "connection was wrong. (attempt 2 of 2)"}
    assert sorted(rig.store.kept) == ["1", "2"]


def test_items_that_wait_for_another_attempt_do_not_hold_up_the_others():
    rig = Rig(workers=2, answers={str(i): [CONNECTION] for i in range(8)})
    rig.scheduler.retry = RetryPlan(2, base=100.0, longest=200.0, rng=random.Random(1))
    status = rig.run(40)
    assert status.done == 40 and status.retried == 8
    first = {job: time for job, attempt, time in reversed(rig.attempts) if attempt == 1}
    assert max(first.values()) < 25.0  # 48 attempts of a second on two workers, and not after the first wait


def test_back_off_doubles_has_jitter_and_an_end():
    plan = RetryPlan(10, base=1.0, longest=8.0, rng=random.Random(3))
    state = random.getstate()
    waits = [[plan.wait(attempt) for _ in range(50)] for attempt in range(1, 7)]
    assert random.getstate() == state, "the global generator is not touched"
    for attempt, drawn in enumerate(waits):
        whole = min(8.0, 2.0**attempt)
        assert all(whole / 2 <= wait <= whole for wait in drawn) and len(set(drawn)) > 40


@pytest.mark.parametrize("policy", POLICIES)
def test_deaths_lose_nothing(policy):
    rig = Rig(workers=4, seconds=2.0, policy=policy, retries=30, deaths=0.2)
    status = rig.run(60)
    assert rig.pool.died > 10
    assert sorted(rig.store.kept, key=int) == [str(i) for i in range(60)]
    assert status.failed == 0


def test_a_job_that_hangs_is_ended_and_holds_nobody_up():
    rig = Rig(workers=2, limit=10.0, start=1.0)
    rig.pool.durations = lambda job_id: float("inf") if job_id == "3" else 1.0
    status = rig.run(12)
    assert (status.done, status.failed, status.retried) == (11, 1, 2)
    assert rig.store.failed == {"3": "it was not done after 0.166667 minutes (attempt 3 of 3)"}
    assert 30 < rig.pool.time < 60  # three attempts, their waits, and a new worker each time
    assert [attempt for job, attempt, _ in rig.attempts if job == "3"] == [1, 2, 3]
    assert len(rig.attempts) == 14  # nobody else's job is repeated


def test_a_job_that_kills_every_worker_is_given_up():
    rig = Rig(workers=2, retries=1)
    submit = rig.pool.submit

    def deadly(slot, payload):
        submit(slot, payload)
        if payload["id"] == "3":
            rig.pool._events[:] = [e for e in rig.pool._events if e[3].slot != slot]
            rig.pool._after(0.5, slot, Died(slot, "the worker was killed", "3"))

    rig.pool.submit = deadly
    status = rig.run(8)
    assert status.failed == 1 and status.done == 7
    assert rig.store.failed["3"] == "the worker was killed while it ran this (attempt 2 of 2)"


class Roomless(Rig):
    """A rig in which workers `full` have no room on their own disks, which they notice at once; or fail at something else."""

    kind, error = DISK, "no room left on a disk."

    def __init__(self, full: set[int], **options):
        super().__init__(**options)
        wait = self.pool.wait

        def watched(timeout):
            events = []
            for event in wait(timeout):
                if isinstance(event, Finished) and event.slot in full:
                    result = {"status": "failed", "kind": self.kind, "error": self.error, "seconds": 0.1}
                    event = Finished(event.slot, event.job_id, result)
                events.append(event)
            return events

        self.pool.wait = watched


@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_disk_of_one_worker_is_that_workers_failure(policy):
    """Its items are done elsewhere, and it does not go through all the others meanwhile."""
    rig = Roomless({0}, workers=3, policy=policy, speeds=(20.0, 1.0, 1.0))
    status = rig.run(30)
    assert sorted(rig.store.kept, key=int) == [str(i) for i in range(30)] and not rig.store.failed
    assert status.retried == WITHOUT_ROOM == len([slot for slot, _ in rig.given if slot == 0])


def test_the_last_item_is_repeated_elsewhere():
    rig = Roomless({0}, workers=2, speeds=(20.0, 1.0))
    assert rig.run(1).done == 1
    assert rig.given == [(0, "0"), (1, "0")]


def test_without_room_anywhere_the_run_ends_and_says_why():
    with pytest.raises(NoWorkers, match="no room left on a disk"):
        Roomless({0, 1}, workers=2).run(30)
    rig = Roomless({0, 1}, workers=2, retries=1)
    assert rig.run(1).failed == 1 and rig.store.failed["0"] == "no room left on a disk. (attempt 2 of 2)"


def test_without_room_for_the_results_the_run_ends():
    rig = Roomless({0}, workers=3)
    rig.store.full = lambda: True
    with pytest.raises(DiskFull, match="no room left on a disk"):
        rig.run(30)


class Broken(Roomless):
    """A rig in which some workers fail whatever they are given. renewed: what was replaced; helps: whether that mends it."""

    kind, error = ITEM, "it cannot be."

    def __init__(self, broken: set[int], helps=False, **options):
        speeds = [50.0 if slot in broken else 1.0 for slot in range(options["workers"])]
        super().__init__(broken, speeds=speeds, **options)
        self.renewed: list[int] = []
        renew = self.pool.renew

        def watched(slot):
            self.renewed.append(slot)
            if helps:
                broken.discard(slot)
            renew(slot)

        self.pool.renew = watched


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("helps", [False, True])
def test_a_worker_that_fails_what_others_finish_does_not_eat_the_list(policy, helps):
    rig = Broken({0}, helps, workers=3, policy=policy, seconds=5.0)
    status = rig.run(60)
    assert status.done == 60 - (IN_A_ROW - 1) and status.failed == IN_A_ROW - 1
    assert rig.renewed == [0] and rig.scheduler._gone == [not helps, False, False]
    assert len(rig.given) == 60 + (1 if helps else 2)


def test_a_list_of_bad_items_is_not_the_workers_fault():
    bad = {str(i): [ITEM] * 9 for i in range(60) if i >= 6}
    rig = Broken(set(), workers=2, answers=bad)
    status = rig.run(60)
    assert (status.done, status.failed) == (6, 54) and not rig.renewed and not any(rig.scheduler._gone)
    assert len(rig.given) < 60 * 1.25  # few are tried twice to find that out
    assert Broken(set(), workers=1, answers=bad).run(60).failed == 54


def test_two_workers_in_doubt_do_not_wait_for_each_other():
    status = Broken({0, 1}, workers=2).run(30)
    assert status.failed == 30


def test_what_a_worker_runs_when_it_is_found_to_blame_is_not_lost():
    """It has work when there was no worker without doubts to wait for."""
    rig = Broken(set(), workers=2)
    wait = rig.pool.wait

    def watched(timeout):
        if rig.scheduler._running[0] is not None and not rig.renewed:
            rig.scheduler._replace(0)
        return wait(timeout)

    rig.pool.wait = watched
    status = rig.run(8)
    assert rig.renewed == [0] and (status.done, status.retried) == (8, 1)


def test_a_worker_whose_device_is_broken_is_replaced_and_the_item_goes_elsewhere():
    class Rigged(Broken):
        kind, error = WORKER, "an illegal memory access was encountered"

    rig = Rigged({0}, helps=True, workers=2)
    status = rig.run(20)
    assert status.done == 20 and status.retried == 1 and rig.renewed == [0]
    slots = [slot for slot, job in rig.given if job == "0"]
    assert slots == [0, 1]


def test_without_workers_the_run_ends_and_says_why():
    rig = Rig(workers=2)
    rig.pool.start = lambda: [
        rig.pool._after(1.0, slot, Died(slot, "no such place", None, final=True)) for slot in (0, 1)
    ]
    wait = rig.pool.wait
    rig.pool.wait = lambda timeout: [e for e in wait(timeout) if isinstance(e, Died) and e.final]
    with pytest.raises(NoWorkers, match="no such place"):
        rig.run(5)


def test_the_same_content_is_computed_once():
    rig = Rig(workers=2)
    seen: list[str] = []
    rig.store.done = lambda job: (
        job.item.label.startswith("twin") and job.id in rig.store.kept and not seen.append(job.id)
    )
    status = rig.run(10, twins={2, 7})
    assert sorted(rig.store.kept, key=int) == [str(i) for i in range(10)]
    assert sorted(seen) == ["2", "7"] and status.over == 12


def test_which_errors_can_pass():
    def wrapped(error: Exception) -> NodeFailed:
        try:
            raise NodeFailed(Node("1", "X", {}), error, RunResult()) from error
        except NodeFailed as failed:
            return failed

    import torch

    assert failure_kind(wrapped(torch.OutOfMemoryError("CUDA out of memory"))) == MEMORY
    assert failure_kind(wrapped(RuntimeError("DefaultCPUAllocator: not enough memory"))) == MEMORY
    assert failure_kind(wrapped(RuntimeError("CUDA error: an illegal memory access was encountered"))) == WORKER
    assert failure_kind(RuntimeError("HIP error: unspecified launch failure")) == WORKER
    assert failure_kind(RuntimeError("CUDA error: out of memory")) == MEMORY
    assert failure_kind(RuntimeError("CUDA error: no kernel image is available for execution")) == ITEM
    assert failure_kind(wrapped(ConnectionResetError())) == CONNECTION
    assert failure_kind(OSError(116, "Stale file handle")) == CONNECTION
    assert failure_kind(wrapped(ValueError("x.png is not a picture"))) == ITEM
    assert failure_kind(FileNotFoundError(2, "none")) == ITEM
    held = PermissionError(13, "used by another process", "a.png")
    held.winerror = 32  # type: ignore[misc,attr-defined,unused-ignore]
    assert failure_kind(wrapped(held)) == CONNECTION and failure_kind(PermissionError(13, "closed", "a.png")) == ITEM
    assert told_kind("PermissionError", "[WinError 32] The process cannot access the file: 'a.png'") == CONNECTION
    assert RetryPlan(2).again(WORKER, 2) and not RetryPlan(2).again(WORKER, 3) and not RetryPlan(2).again(ITEM, 1)


def test_remaining_time():
    now = [0.0]
    status = Status(10, clock=lambda: now[0])
    assert status.remaining() is None
    for _ in range(4):
        now[0] += 30.0
        status.done += 1
        status.ended()
    status.running[0] = 0.5
    assert status.remaining() == pytest.approx(5.5 * 30)
    assert status.line() == "4 of 10, 1 running on 0 workers, 2.0 a minute, 2:45 left"


def test_least_busy_is_best_when_jobs_differ():
    """Why it is the default: simulated, lengths of jobs spread as those of captions are."""
    rng = random.Random(0)
    lengths = [rng.lognormvariate(0, 0.7) for _ in range(400)]
    seconds = {policy: simulate(Cluster(8), lengths, policy).seconds for policy in POLICIES}
    assert seconds["least_busy"] < seconds["round_robin"] and seconds["least_busy"] < seconds["random"]
    assert seconds["least_busy"] < 1.1 * sum(lengths) / 8 + max(lengths)
    assert simulate(Cluster(8), lengths, "random", seed=4) == simulate(Cluster(8), lengths, "random", seed=4)
