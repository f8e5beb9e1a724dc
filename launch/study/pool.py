"""Run jobs in processes, several at the same time: each on its own cores, and after the jobs that it needs."""

import graphlib
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from launch.study import plan, work

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP comes when the terminal is closed


class _Running(NamedTuple):
    job: plan.Job
    process: BaseProcess
    cores: set | None
    began: float


def run(jobs, num_at_once, say=lambda line: print(line, file=sys.stderr, flush=True)):
    """Run all jobs that have no results yet; return {name: reason} of jobs that failed or need a failed job.

    Raises KeyboardInterrupt after a signal, when the running jobs have saved their state.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["launch.study.measure", "launch.study.vae", "configs.small"])
    by_name = {job.name: job for job in jobs}
    graph = graphlib.TopologicalSorter({job.name: job.needs for job in jobs})
    graph.prepare()
    finished = {job.name for job in jobs if work.results(job) is not None}
    began, num_before = time.monotonic(), len(finished)
    waiting, running, free_cores, failed = [], [], _core_sets(num_at_once), {}
    # A process that nohup started ignores SIGHUP, and must do so here.
    handled = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, _interrupt) for number in handled}

    def progress():
        num_done, num_left = len(finished) - num_before, len(jobs) - len(finished) - len(failed)
        minutes = (time.monotonic() - began) / 60 / num_done * num_left if num_done else 0
        return f"[{len(finished)} of {len(jobs)}{f', about {minutes:.0f} min left' if minutes else ''}]"

    try:
        while graph.is_active():
            while ready := graph.get_ready():  # again, because a finished job may release others
                for name in ready:
                    if name in finished:
                        graph.done(name)
                    elif lost := [need for need in by_name[name].needs if need in failed]:
                        failed[name] = f"left out, because {lost[0]} failed"
                        say(f"error: {name} is {failed[name]}")
                        graph.done(name)
                    else:
                        waiting.append(name)
            waiting.sort(key=list(by_name).index)
            while free_cores and waiting:
                job = by_name[waiting.pop(0)]
                running.append(_start(processes, job, free_cores.pop(0)))
                say(f"{progress()} starts: {job.name}")
            for one in _wait(running):
                running.remove(one)
                free_cores.append(one.cores)
                graph.done(one.job.name)
                if one.process.exitcode == 0:
                    finished.add(one.job.name)
                    say(f"{progress()} done: {one.job.name}, {time.monotonic() - one.began:.0f} s")
                else:
                    failed[one.job.name] = f"status {one.process.exitcode}: {_last_line(one.job)}"
                    say(f"error: {one.job.name} failed ({failed[one.job.name]}); its output: {_log(one.job)}")
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.join()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return failed


def _core_sets(count):
    """Return a set of cores for each job that may run at the same time; None if the system does not list cores."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * count
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[number::count]) or set(cores) for number in range(count)]


def _start(processes, job, cores):
    job.workdir.mkdir(parents=True, exist_ok=True)
    process = processes.Process(target=work.run_in_process, args=(job, cores, _log(job)))
    process.start()
    return _Running(job, process, cores, time.monotonic())


def _wait(running):
    """Wait until at least one process ends; return all that have ended."""
    ended = connection.wait([one.process.sentinel for one in running]) if running else []
    found = [one for one in running if one.process.sentinel in ended]
    for one in found:
        one.process.join()
    return found


def _interrupt(number, frame):
    raise KeyboardInterrupt(number)


def _log(job):
    return job.workdir / "log.txt"


def _last_line(job):
    lines = _log(job).read_text(errors="replace").split("\n") if _log(job).exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")
