"""Provide what all benchmarks use: command line, processes of their own, times, tables, JSON as the last line."""

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple


class Seconds(NamedTuple):
    """Duration of a call. `cpu` sums over all threads of the process; other programs disturb it less than `wall`."""

    wall: float
    cpu: float


class NoData:
    """Stands for the data iterator, whose position a checkpoint holds."""

    def get_state(self):
        return {"position": 0}

    def set_state(self, position):
        pass


def parser(doc):
    """Return a parser of the command line that shows the module's docstring as help."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def print_json(values):
    """Print the results as one JSON object; a benchmark calls this last."""
    print(json.dumps(values), flush=True)


def own_process():
    """Return an executor with one new process: `with own_process() as p: p.submit(function, *args).result()`."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_print_to_stderr)


def call_in_own_process(function, *args):
    """Return `function(*args)`, called in a new process that ends afterwards."""
    with own_process() as process:
        return process.submit(function, *args).result()


def _print_to_stderr():
    os.dup2(2, 1)  # libraries print; the last line of standard output must be the JSON object


def timed(function, *args):
    """Return (result, Seconds) of one call."""
    began, cpu_began = time.perf_counter(), time.process_time()
    result = function(*args)
    return result, Seconds(time.perf_counter() - began, time.process_time() - cpu_began)


def wall_times(function, count):
    """Return the wall-clock seconds of `count` calls, one after the other."""
    return [timed(function)[1].wall for _ in range(count)]


def markdown_table(header, rows):
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
