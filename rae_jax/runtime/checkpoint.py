"""Checkpoints of a stage: its whole state and the position of its data iterator, through Orbax.

STAGE/STEP/ holds Orbax's folders `state` and `data`, and a manifest of all files. The manifest is written last, before
the folder gets its final name. A folder with a final name was therefore complete, and damage that happens later is
detected before the checkpoint is used.
"""

import concurrent.futures
import contextlib
import math
import os
import re
import secrets
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rae_jax.errors import UserError, one_line
from rae_jax.runtime import atomic_files, checkpoint_manifest, checkpoint_reader, logs, processes

_DISCARDED = ".discarded-"  # start of the names of partial checkpoints that could not be removed
LONGEST_PAUSE = 600.0  # seconds between two attempts to write
BARRIER_TIMEOUT = 300  # seconds that a process waits for the others at the end of a write; another one may have failed
WAIT_FOR_WRITE = 10.0  # seconds after the start of a write for which the next checkpoint waits until the write ends
# Errors of a program. Disks, networks and Orbax raise other types: OSError, ValueError, RuntimeError.
_PROGRAM_ERRORS = (TypeError, AttributeError, NameError, LookupError, AssertionError, NotImplementedError)


class Checkpoints:
    """The checkpoints of one stage in `folder`/STEP; a context manager that finishes every write at its end.

    It keeps the newest `keep` checkpoints, the checkpoint of every `keep_every`-th step (0: none) and the one with the
    highest score. It removes a checkpoint only after the next one is complete. If a checkpoint cannot be written,
    `on_error`='continue' reports it and retries with growing pauses; 'stop' raises UserError.
    """

    def __init__(self, folder, *, keep, every=1, keep_every=0, on_error="stop"):
        self._folder = checkpoint_reader.absolute(folder)
        self._keep, self._every, self._keep_every, self._on_error = keep, every, keep_every, on_error
        self._due, self._failures, self._not_before = False, 0, 0.0
        self._pending, self._began, self._step, self._score, self._reason = None, 0.0, None, None, ""
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._discard_unfinished()  # left by a run that was killed
        self._writer = self._new_writer()

    def __enter__(self):
        return self

    def __exit__(self, kind, raised, _):
        if kind is not None and processes.lost_another(raised):
            return  # the write in progress would wait for that process in vain
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
        """The step of the newest finished checkpoint that this process sees, or None."""
        return max(checkpoint_reader.steps(self._folder), default=None)

    def newest_in_words(self):
        """Return the newest checkpoint in words, for messages, after the write in progress has ended."""
        with contextlib.suppress(UserError):
            self._collect(wait=True)
        return "no checkpoint exists" if self.latest is None else f"last good checkpoint: {self._path(self.latest)}"

    @property
    def finished(self):
        """True if no write is in progress."""
        self._collect(wait=False)
        return self._pending is None

    def wants(self, step, score=None):
        """Return whether to save after this step: at every `every`-th step, and if the score is the best one so far.

        The checkpoint is delayed if the write of the previous one takes more than `WAIT_FOR_WRITE` seconds, or if it
        failed and its pause has not ended. Several processes, which must decide alike, wait for the write instead, and
        retry when the next checkpoint is due.
        """
        self._due |= step % self._every == 0 or self._is_best(score)
        if jax.process_count() > 1:
            due, self._due = self._due, False
            return due
        if self._due and self._pending is not None:
            concurrent.futures.wait([self._pending], max(0.0, self._began + WAIT_FOR_WRITE - time.monotonic()))
        self._collect(wait=False)
        return self._due and self._pending is None and time.monotonic() >= self._not_before

    def save(self, step, state, iterator, score=None):
        """Start to write and return; a thread continues the write. The caller may donate the state then.

        The iterator's position counts the batches consumed. It is the same on every process, so that a different number
        of processes can resume.
        """
        self._collect(wait=True)
        if step in checkpoint_reader.steps(self._folder):
            return
        self._step, self._score, self._due, self._began = step, score, False, time.monotonic()
        # If devices have their own memory, Orbax copies the state to the host. On CPU, Orbax reads the state in place
        # until the write ends, and the step that the state is donated to would wait for this end: a copy costs less.
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
        """Write and wait until the write has ended; with `on_error`='continue' retry for `patience()` seconds.

        Raises UserError if the checkpoint cannot be written.
        """
        began = time.monotonic()

        def out_of_time():
            return jax.process_count() > 1 or time.monotonic() - began > patience()

        while True:
            self.save(step, state, iterator, score)
            self._collect(wait=True)
            if processes.agreed(step in checkpoint_reader.steps(self._folder)):
                return
            while not out_of_time() and time.monotonic() < self._not_before:
                time.sleep(0.2)
            if out_of_time():
                raise UserError(
                    f"the checkpoint of step {step} cannot be written to {self._folder} ({self._reason}): make room "
                    f"or fix the cause, then run the same command again; {self.newest_in_words()}"
                )

    def newest_whole(self):
        """Return the step of the newest undamaged checkpoint, or None if the stage never had a checkpoint.

        Damaged checkpoints are reported and renamed. Raises UserError if all checkpoints are damaged.
        """
        if jax.process_index() == 0:
            for step in reversed(checkpoint_reader.steps(self._folder)):
                path = self._path(step)
                reason = checkpoint_manifest.damage(path)
                if reason is None:
                    break
                aside = checkpoint_manifest.set_aside(path)
                logs.say(f"the checkpoint {path} is damaged ({reason}): renamed to {aside.name}")
        step = checkpoint_reader.latest_step(self._folder)
        if step is None and processes.agreed(
            any(".damaged" in path.name for path in checkpoint_reader.inside(self._folder))
        ):
            raise UserError(
                f"all checkpoints in {self._folder} are damaged: restore an undamaged copy, or remove that folder "
                f"to train this stage from its first step"
            )
        return step

    def note_score(self, step, score):
        """Add the score to a finished checkpoint that was written without one; None adds nothing."""
        if score is not None and jax.process_index() == 0:
            self._collect(wait=True)
            try:
                checkpoint_manifest.note_score(self._path(step), score)
                self._remove_old()
            except Exception as error:  # of many kinds; the run need not end
                logs.say(f"cannot note the score of {self._path(step)} ({atomic_files.reason(error)})")

    def restore(self, step, abstract_state, iterator):
        """Return the state with the shardings of `abstract_state`, and move `iterator` to the checkpoint's position.

        Raises UserError if the position is missing or belongs to other data.
        """
        parts = {"state": ocp.args.StandardRestore(abstract_state), "data": ocp.args.JsonRestore()}
        try:
            restored = self._writer.restore(self._path(step), args=ocp.args.Composite(**parts))
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            if processes.lost_another(error):
                raise
            raise UserError(
                f"{self._path(step)} is not a whole checkpoint ({_reason(error)}): remove that folder to resume "
                f"from the checkpoint before it, or set another --workdir"
            ) from error
        iterator.set_state(restored["data"])
        return restored["state"]

    def _path(self, step):
        return self._folder / str(step)

    def _new_writer(self):
        options = ocp.options.AsyncOptions(
            timeout_secs=BARRIER_TIMEOUT, post_finalization_callback=self._write_manifest
        )
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)

    def _write_manifest(self):
        """Write the manifest, in the writer's thread, before the folder gets its final name."""
        name = f"{self._step}.orbax-checkpoint-tmp"
        (folder,) = [p for p in self._folder.iterdir() if p.name.startswith(name) or p.name == str(self._step)]
        checkpoint_manifest.write(folder, self._score)

    def _finish(self):
        """Wait for the write, in a thread; then remove the checkpoints that need not stay."""
        self._writer.wait_until_finished()
        self._remove_old()

    def _discard_unfinished(self):
        """Remove partial checkpoints. One that cannot be removed is renamed: its name must not stop the next write."""
        for path in checkpoint_reader.inside(self._folder):
            if checkpoint_reader.is_unfinished(path) or path.name.startswith(_DISCARDED):
                try:
                    path.rmtree()
                except Exception as error:  # of many kinds, if a bucket cannot be reached
                    if not path.name.startswith(_DISCARDED):
                        logs.say(f"cannot remove the partial checkpoint {path} ({atomic_files.reason(error)})")
                        with contextlib.suppress(Exception):
                            path.rename(path.with_name(f"{_DISCARDED}{secrets.token_hex(4)}"))

    def _remove_old(self):
        if jax.process_index() != 0:
            return
        for step in self._steps_to_remove():
            try:
                self._path(step).rmtree()
            except Exception as error:  # of many kinds, if a bucket cannot be reached
                logs.say(f"cannot remove the old checkpoint {self._path(step)} ({atomic_files.reason(error)})")

    def _steps_to_remove(self):
        existing = checkpoint_reader.steps(self._folder)
        found = {step: checkpoint_manifest.score(self._path(step)) for step in existing}
        scores = {step: score for step, score in found.items() if score is not None}
        stay = set(existing[-self._keep :])
        stay |= {step for step in existing if self._keep_every and step % self._keep_every == 0}
        stay |= {max(scores, key=scores.get)} if scores else set()
        return [step for step in existing if step not in stay]

    def _is_best(self, score):
        if score is None or not math.isfinite(score):
            return False
        others = [checkpoint_manifest.score(self._path(step)) for step in checkpoint_reader.steps(self._folder)]
        # The first process decides: the others may see its newest checkpoint later.
        return bool(processes.agreed(all(other is None or score > other for other in others)))

    def _collect(self, *, wait):
        """Note the result of a write that has ended."""
        if self._pending is None or not (wait or self._pending.done()):
            return
        pending, self._pending = self._pending, None
        error = pending.exception()
        if error is None:
            self._failures, self._not_before = 0, 0.0
        else:
            self._failed(error)

    def _failed(self, error):
        # A process that does not reach the end of a write in time may have failed to write, and still run.
        gone = processes.lost_another(error) and "DEADLINE_EXCEEDED" not in str(error)
        if isinstance(error, _PROGRAM_ERRORS) or gone:
            raise error
        self._failures, self._due, self._reason = self._failures + 1, True, _reason(error)
        pause = min(2.0**self._failures, LONGEST_PAUSE)
        self._not_before = time.monotonic() + pause
        if jax.process_index() == 0:
            self._discard_unfinished()  # a partial checkpoint takes room that the next one needs
        self._writer = self._new_writer()
        failure = f"the checkpoint of step {self._step} cannot be written ({self._reason})"
        if self._on_error == "stop":
            raise UserError(
                f"{failure}: make room or fix the cause, then run the same command again; {self.newest_in_words()}"
            )
        logs.say(f"{failure}: training continues, next try in {pause:.0f} s; {self.newest_in_words()}")


@jax.jit
def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def _reason(error):
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # at the end of a long message of TensorStore
        return os.strerror(int(code[1]))
    return one_line(error, longest=300)
