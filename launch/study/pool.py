"""Jobs in processes, some at once, each on cores of its own; those that need others come after them."""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import connection

from launch.study import work

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last, where a terminal is closed


def run(jobs, num_at_once, say=lambda line: print(line, file=sys.stderr, flush=True)):
    """Bring all jobs (in an order in which each comes after those that it needs) to their ends; those that are done are
    not begun. Returns {name of one that failed or was left out: why}; raises KeyboardInterrupt after a signal, when
    those that were at work have saved what they had.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["launch.study.measure", "launch.study.vae", "configs.small"])
    slots = _slots(num_at_once)
    done = {job.name for job in jobs if work.results(job) is not None}
    waiting = [job for job in jobs if job.name not in done]
    at_work, failed, began, first = {}, {}, time.monotonic(), len(done)
    heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has it
    previous = {number: signal.signal(number, _stop) for number in heeded}
    try:
        while waiting or at_work:
            for job in [job for job in waiting if any(name in failed for name in job.needs)]:
                waiting.remove(job)
                failed[job.name] = f"left out, as {next(name for name in job.needs if name in failed)} failed"
                say(f"error: {job.name} is {failed[job.name]}")
            while slots and (job := _next(waiting, done)):
                waiting.remove(job)
                slot = slots.pop(0)
                at_work[job.name] = (job, _start(processes, job, slot), slot, time.monotonic())
                rate = (time.monotonic() - began) / (len(done) - first) if len(done) > first else None
                left = f", about {rate * (len(waiting) + len(at_work)) / 60:.0f} min left" if rate else ""
                say(f"[{len(done)} of {len(jobs)}{left}] begins: {job.name}")
            ended = at_work and connection.wait([process.sentinel for _, process, _, _ in at_work.values()])
            for name, (job, process, slot, since) in list(at_work.items()):
                if process.sentinel not in ended:
                    continue
                process.join()
                del at_work[name]
                slots.append(slot)
                if process.exitcode == 0:
                    done.add(name)
                    say(f"[{len(done)} of {len(jobs)}] done: {name}, {time.monotonic() - since:.0f} s")
                else:
                    failed[name] = f"status {process.exitcode}: {_last_line(job)}"
                    say(f"error: {name} failed ({failed[name]}); all it said: {_log(job)}")
    finally:
        for _, process, *_ in at_work.values():
            process.terminate()
        for _, process, *_ in at_work.values():
            process.join()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return failed


def _slots(count):
    """Sets of cores, as many as jobs may be at work at once; None where the system does not say which there are."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * count
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[number::count]) or set(cores) for number in range(count)]


def _next(waiting, done):
    """The first job that has all it needs."""
    return next((job for job in waiting if done.issuperset(job.needs)), None)


def _start(processes, job, cores):
    job.workdir.mkdir(parents=True, exist_ok=True)
    process = processes.Process(target=work.begin, args=(job, cores, _log(job)))
    process.start()
    return process


def _stop(number, frame):
    raise KeyboardInterrupt(number)


def _log(job):
    return job.workdir / "log.txt"


def _last_line(job):
    lines = _log(job).read_text(errors="replace").split("\n") if _log(job).exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
