"""Checkpoints of a stage: its whole state and the position of its data iterator, through Orbax.

STAGE/STEP/ holds Orbax's folders `state` and `data`, and a manifest of all files. That is the last to be written before
the folder gets its name, so that a folder of that name was whole; and what is damaged later is seen before it is used.
"""

import concurrent.futures
import contextlib
import math
import os
import re
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, checkpoint_manifest, checkpoint_reader, logs, processes

LONGEST_PAUSE = 600.0  # seconds between two tries to write
TOGETHER = 300  # seconds for which a process waits at the end of a write for the others; one may have failed
PROMPT = 10.0  # seconds that a write may take for the next one, which is due, to be waited with
# Of a program. Disks, networks and Orbax raise anything else: OSError, ValueError, RuntimeError.
_MISTAKES = (TypeError, AttributeError, NameError, LookupError, AssertionError, NotImplementedError)


class Checkpoints:
    """The checkpoints of one stage in `folder`/STEP; a context manager that ends with every write finished.

    The newest `keep` of them stay, those of every `keep_every`-th step (0: none) and the one with the highest score.
    None goes before the next is whole. With `on_error`='continue' one that cannot be written is reported and tried
    again, with growing pauses; 'stop' raises UserError.
    """

    def __init__(self, folder, *, keep, every=1, keep_every=0, on_error="stop"):
        self._folder = checkpoint_reader.absolute(folder)
        self._keep, self._every, self._keep_every, self._on_error = keep, every, keep_every, on_error
        self._due, self._failures, self._not_before = False, 0, 0.0
        self._pending, self._began, self._step, self._score, self._reason = None, 0.0, None, None, ""
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in checkpoint_reader.inside(self._folder):
                if checkpoint_reader.is_unfinished(path):  # of a run that was killed
                    path.rmtree()
        self._writer = self._new_writer()

    def __enter__(self):
        return self

    def __exit__(self, kind, raised, _):
        if kind is not None and processes.lost_another(raised):
            return  # what is being written waits for it in vain
        try:
            self._collect(wait=True)
        except UserError as error:
            if kind is None:
                raise
            logs.say(str(error))
        finally:
            self._finisher.shutdown()
            with contextlib.suppress(Exception):
                self._writer.close()

    @property
    def latest(self):
        """Newest finished checkpoint's step as this process sees it, or None."""
        return max(checkpoint_reader.steps(self._folder), default=None)

    def newest_in_words(self):
        """Where to go on from, for messages; what is being written is waited for."""
        with contextlib.suppress(UserError):
            self._collect(wait=True)
        return "there is no checkpoint" if self.latest is None else f"last good checkpoint: {self._path(self.latest)}"

    @property
    def finished(self):
        """Whether nothing is being written."""
        self._collect(wait=False)
        return self._pending is None

    def wants(self, step, score=None):
        """Whether to save after this step: one in `every`, and where the score is the best one so far.

        Later where the one before is still being written after `PROMPT` seconds, and again after a pause where it could
        not be. Several processes, who have to do the same, wait instead, and try again when the next one is due.
        """
        self._due |= step % self._every == 0 or self._is_best(score)
        if jax.process_count() > 1:
            due, self._due = self._due, False
            return due
        if self._due and self._pending is not None:
            concurrent.futures.wait([self._pending], max(0.0, self._began + PROMPT - time.monotonic()))
        self._collect(wait=False)
        return self._due and self._pending is None and time.monotonic() >= self._not_before

    def save(self, step, state, iterator, score=None):
        """Begin to write, and return while a thread goes on; the state may be donated then.

        The iterator's position is the one consumed: a few numbers that hold for every process, so that another number
        of them can go on.
        """
        self._collect(wait=True)
        if step in checkpoint_reader.steps(self._folder):
            return
        self._step, self._score, self._due, self._began = step, score, False, time.monotonic()
        # Where memory is the devices' own, Orbax copies it to the host. On CPU it reads it where it lies until all is
        # written, and the step that the state is donated to would wait for that: a copy costs much less.
        if jax.default_backend() == "cpu":
            state = _copy(state)
        parts = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(iterator.get_state())}
        try:
            self._writer.save(self._path(step), args=ocp.args.Composite(**parts))
        except Exception as error:
            self._failed(error)
            return
        self._pending = self._finisher.submit(self._finish)

    def save_surely(self, step, state, iterator, score=None, *, patience):
        """Write and wait until it is done; with `on_error`='continue' it is tried again for `patience()` seconds.

        Raises UserError where it cannot be done.
        """
        began = time.monotonic()

        def over():
            return jax.process_count() > 1 or time.monotonic() - began > patience()

        while True:
            self.save(step, state, iterator, score)
            self._collect(wait=True)
            if processes.agreed(step in checkpoint_reader.steps(self._folder)):
                return
            while not over() and time.monotonic() < self._not_before:
                time.sleep(0.2)
            if over():
                raise UserError(
                    f"the checkpoint of step {step} cannot be written to {self._folder} ({self._reason}): make room, "
                    f"or mend what hinders it; {self.newest_in_words()}, from which the same command goes on"
                )

    def newest_whole(self):
        """Step of the newest one that is undamaged, or None where the stage never had any.

        Those that are damaged are reported and set aside. Raises UserError where no other is left.
        """
        if jax.process_index() == 0:
            for step in reversed(checkpoint_reader.steps(self._folder)):
                path = self._path(step)
                reason = checkpoint_manifest.damage(path)
                if reason is None:
                    break
                aside = checkpoint_manifest.set_aside(path)
                logs.say(f"the checkpoint {path} is damaged ({reason}): set aside as {aside.name}")
        step = checkpoint_reader.latest_step(self._folder)
        if step is None and processes.agreed(
            any(".damaged" in path.name for path in checkpoint_reader.inside(self._folder))
        ):
            raise UserError(
                f"all checkpoints in {self._folder} are damaged: bring a whole one back, or remove that folder to "
                f"train this stage from its beginning"
            )
        return step

    def note_score(self, step, score):
        """Give a finished checkpoint the score that it was written without; None: it has none."""
        if score is not None and jax.process_index() == 0:
            try:
                checkpoint_manifest.note_score(self._path(step), score)
            except Exception as error:  # the run need not end for it
                logs.say(f"cannot note the score of {self._path(step)} ({atomic_files.reason(error)})")

    def restore(self, step, abstract_state, iterator):
        """The state, placed as `abstract_state` says; `iterator` is moved to its position.

        Raises UserError where the checkpoint's position is missing, or that of other data.
        """
        parts = {"state": ocp.args.StandardRestore(abstract_state), "data": ocp.args.JsonRestore()}
        try:
            restored = self._writer.restore(self._path(step), args=ocp.args.Composite(**parts))
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            if processes.lost_another(error):
                raise
            raise UserError(
                f"{self._path(step)} is not a whole checkpoint ({_in_one_line(error)}): remove that folder to go on "
                f"from the one before, or take another --workdir"
            ) from error
        iterator.set_state(restored["data"])
        return restored["state"]

    def _path(self, step):
        return self._folder / str(step)

    def _new_writer(self):
        how = {"timeout_secs": TOGETHER, "post_finalization_callback": self._seal}
        options = ocp.options.AsyncOptions(**how)
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)

    def _seal(self):
        """In the writer's thread, before the folder gets its name."""
        name = f"{self._step}.orbax-checkpoint-tmp"
        (folder,) = [p for p in self._folder.iterdir() if p.name.startswith(name) or p.name == str(self._step)]
        checkpoint_manifest.write(folder, self._score)

    def _finish(self):
        """In a thread: wait for the write, then remove what need not stay."""
        self._writer.wait_until_finished()
        if jax.process_index() == 0:
            for step in self._superfluous():
                try:
                    self._path(step).rmtree()
                except Exception as error:  # of many kinds, where a bucket is away
                    logs.say(f"cannot remove the old checkpoint {self._path(step)} ({atomic_files.reason(error)})")

    def _superfluous(self):
        there = checkpoint_reader.steps(self._folder)
        scores = {step: score for step in there if (score := checkpoint_manifest.score(self._path(step))) is not None}
        stay = set(there[-self._keep :])
        stay |= {step for step in there if self._keep_every and step % self._keep_every == 0}
        stay |= {max(scores, key=scores.get)} if scores else set()
        return [step for step in there if step not in stay]

    def _is_best(self, score):
        if score is None or not math.isfinite(score):
            return False
        others = [checkpoint_manifest.score(self._path(step)) for step in checkpoint_reader.steps(self._folder)]
        # The first process says so: the others may see its newest one later than it does.
        return bool(processes.agreed(all(other is None or score > other for other in others)))

    def _collect(self, *, wait):
        """Take notice of a write that has ended."""
        if self._pending is None or not (wait or self._pending.done()):
            return
        pending, self._pending = self._pending, None
        error = pending.exception()
        if error is None:
            self._failures, self._not_before = 0, 0.0
        else:
            self._failed(error)

    def _failed(self, error):
        # At the end of a write, another process that does not come in time may have failed to write, and be well.
        gone = processes.lost_another(error) and "DEADLINE_EXCEEDED" not in str(error)
        if isinstance(error, _MISTAKES) or gone:
            raise error
        self._failures, self._due, self._reason = self._failures + 1, True, _in_one_line(error)
        pause = min(2.0**self._failures, LONGEST_PAUSE)
        self._not_before = time.monotonic() + pause
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # half a checkpoint takes room that the next one needs
                for path in self._folder.iterdir():
                    if checkpoint_reader.is_unfinished(path):
                        path.rmtree()
        self._writer = self._new_writer()
        said = f"the checkpoint of step {self._step} cannot be written ({self._reason})"
        if self._on_error == "stop":
            raise UserError(f"{said}; {self.newest_in_words()}, from which the same command goes on")
        logs.say(f"{said}: training goes on, next try in {pause:.0f} s; {self.newest_in_words()}")


@jax.jit
def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def _in_one_line(error):
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # at the end of a screenful of TensorStore's
        return os.strerror(int(code[1]))
    return " ".join(str(error).split())[:300] or type(error).__name__
