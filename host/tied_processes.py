"""Processes that end with the one that started them, and with all that they have started: on Windows by a job object.

Elsewhere a group of processes and `headless.orphans` see to it. On Windows a child outlives a parent that was killed, and to
kill a process leaves its children. The system itself ends what is in a job when the last handle of the job is closed, whatever
became of who held it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import weakref
from typing import Any

log = logging.getLogger("hotpath.host")

KILL_ON_CLOSE = 0x2000
EXTENDED_LIMITS = 9  # which kind of facts of a job is set
MAY_SET_QUOTA, MAY_TERMINATE = 0x0100, 0x0001  # what it takes to put a process into a job
ENDED = 1  # the exit code of what is ended with its job

_jobs: weakref.WeakKeyDictionary[subprocess.Popen[bytes], int] = weakref.WeakKeyDictionary()


class _BasicLimits(ctypes.Structure):
    _fields_ = (
        ("process_time", ctypes.c_int64),
        ("job_time", ctypes.c_int64),
        ("flags", ctypes.c_uint32),
        ("least_memory", ctypes.c_size_t),
        ("most_memory", ctypes.c_size_t),
        ("processes", ctypes.c_uint32),
        ("affinity", ctypes.c_size_t),
        ("priority", ctypes.c_uint32),
        ("scheduling", ctypes.c_uint32),
    )


class _Limits(ctypes.Structure):
    _fields_ = (
        ("basic", _BasicLimits),
        ("transfers", ctypes.c_uint64 * 6),
        ("memory", ctypes.c_size_t * 4),
    )


def tie(process: subprocess.Popen[bytes]) -> None:
    """Let `process`, which has just begun, and what it starts end with this process. Without effect but on Windows; where the
    system refuses, it is a process like any other."""
    if os.name != "nt":
        return
    try:
        kernel = _kernel()
        job = kernel.CreateJobObjectW(None, None)
        if not job:
            raise OSError("there is no job")
        weakref.finalize(process, kernel.CloseHandle, job)
        limits = _Limits(basic=_BasicLimits(flags=KILL_ON_CLOSE))
        if not kernel.SetInformationJobObject(job, EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits)):
            raise OSError("the job takes no limits")
        handle = kernel.OpenProcess(MAY_SET_QUOTA | MAY_TERMINATE, False, process.pid)
        if not handle:
            raise OSError("the process cannot be opened")
        try:
            if not kernel.AssignProcessToJobObject(job, handle):
                raise OSError("the process goes into no job")
        finally:
            kernel.CloseHandle(handle)
        _jobs[process] = job
    except Exception as error:  # no start fails for want of it
        log.debug("process %d may outlive this one: %s", process.pid, error)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill `process` at once, and what it has started where it is tied."""
    job = _jobs.get(process)
    if job is None or not _kernel().TerminateJobObject(job, ENDED):
        process.kill()


def _kernel() -> Any:
    kernel = ctypes.CDLL("kernel32")
    handle, number, truth = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int
    for name, given, result in (
        ("CreateJobObjectW", (ctypes.c_void_p, ctypes.c_wchar_p), handle),
        ("SetInformationJobObject", (handle, ctypes.c_int, ctypes.c_void_p, number), truth),
        ("OpenProcess", (number, truth, number), handle),
        ("AssignProcessToJobObject", (handle, handle), truth),
        ("TerminateJobObject", (handle, ctypes.c_uint), truth),
        ("CloseHandle", (handle,), truth),
    ):
        function = getattr(kernel, name)
        function.argtypes, function.restype = given, result
    return kernel
