"""The training loop, the same for every stage: restore, step, log, evaluate, save. It knows no loss and no model."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable

import jax

from rae_jax.runtime import checkpoint, health, heartbeat, logs, processes, sharding
from rae_jax.training.clock import Clock

# Seconds of retries for a checkpoint that cannot be written: after the last step; and after a signal, because then the
# machine may be taken away soon.
LAST_PATIENCE, STOPPING_PATIENCE = 600.0, 20.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """The parts of a stage that the loop needs.

    `step(state, frozen, batch, key) -> (state, metrics)` is pure. `state` holds 'step', the number of finished steps; a
    checkpoint holds the state and nothing else of the stage. `frozen` is neither trained nor saved.
    """

    name: str
    init: Callable
    step: Callable
    frozen: dict
    batches: object  # this process's part of each global batch (data.pipeline.Batches)
    batch_size: int
    num_steps: int
    begin: Callable | None = None  # new state -> state, when the stage begins: for weights to start from


class InterruptedRun(Exception):
    """A signal, `number`, ended the run after a checkpoint was written."""

    def __init__(self, message, number):
        super().__init__(message)
        self.number = number


def fit(
    stage,
    *,
    workdir,
    mesh,
    key,
    log_every,
    checkpoint_every,
    keep,
    evaluate=None,
    evaluate_every=0,
    scored=False,
    health_settings=health.OFF,
    tracker=None,
    **saving,
):
    """Train `stage` to its last step, from its newest undamaged checkpoint if one exists.

    The key of step n is fold_in(key, n): interruptions do not change the results. Every `evaluate_every` steps (0:
    never) `evaluate(state, step)` returns more numbers to write; with `scored`, its 'score' selects the best
    checkpoint. `tracker`: a logs.WandB. `saving`: further arguments of Checkpoints. Raises InterruptedRun after a first
    SIGINT or SIGTERM, DivergedRun for a step that is not finite and may not be skipped, UserError for a checkpoint that
    cannot be read or written.
    """
    abstract = sharding.abstract(jax.eval_shape(stage.init, key), mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    frozen = jax.device_put(stage.frozen, sharding.shardings(stage.frozen, mesh))
    stage = dataclasses.replace(stage, step=health.guarded(stage.step, health_settings.skip))
    feed = _Feed(iter(stage.batches), mesh)

    kept = checkpoint.Checkpoints(workdir / "checkpoints" / stage.name, keep=keep, every=checkpoint_every, **saving)
    with kept as checkpoints, _Signals() as signals, contextlib.closing(feed):
        start, state = _begin(stage, checkpoints, abstract, feed, key)
        step_fn = compiled_step(stage.step, placed, mesh)
        metrics_file = logs.Metrics(workdir, stage.name, step=start, tracker=tracker)
        settings, incidents = health_settings, health.Incidents(workdir, stage.name)
        watch = health.Watch(stage, settings, incidents, checkpoints.newest_in_words)
        beats = heartbeat.Heartbeat(workdir, stage, start=start, every=settings.heartbeat, stalled=settings.stalled)
        progress = logs.Progress(stage.name, total=stage.num_steps, start=start)
        with metrics_file, progress, beats, contextlib.closing(Clock(stage.batch_size)) as clock:
            observers = _Observers(clock, watch, beats, metrics_file, progress)
            evaluations = _Evaluations(evaluate, evaluate_every, metrics_file, beats, clock)
            if evaluations.due(start) and logs.lacks_evaluation(workdir, stage.name, start):
                checkpoints.note_score(
                    start, evaluations.run(start, state)
                )  # the interrupted run skipped this evaluation
            stop = processes.Agreement(lambda: signals.received)
            loop = _Loop(stage, feed, checkpoints, observers, evaluations, stop, log_every, scored)
            loop.run(start, state, lambda state, batch: step_fn(state, frozen, batch, key))


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The steps of a stage, with their logs, evaluations and checkpoints."""

    stage: Stage
    feed: "_Feed"
    checkpoints: checkpoint.Checkpoints
    observers: "_Observers"
    evaluations: "_Evaluations"
    stop: processes.Agreement
    log_every: int
    scored: bool

    def run(self, start, state, step_fn):
        """Take the steps after `start`. Raises InterruptedRun after a checkpoint."""
        stop, clock = self.stop, self.observers.clock
        if start >= self.stage.num_steps and (number := stop.at_the_end()):  # only an evaluation was missing
            raise InterruptedRun(f"interrupted after stage {self.stage.name!r}", number)
        if start < self.stage.num_steps:
            clock.wait_for(self.feed.fetch)
        for step in range(start + 1, self.stage.num_steps + 1):
            last = step == self.stage.num_steps
            state, metrics = step_fn(state, self.feed.take())
            self.observers.began(step, metrics)
            stop.exchange(last=last)
            if not (last or stop.value):
                clock.wait_for(self.feed.fetch)  # the devices compute this step meanwhile
            if step % self.log_every == 0 or last:
                self.observers.log(step, metrics)
            # An evaluation comes after the checkpoint: it may take longer than the grace period of a preempted machine,
            # and a resumed run runs the missing evaluation. It comes before a checkpoint that its score decides on.
            due = self.evaluations.due(step)
            early = due and self.scored and not (last or stop.value)
            score = self.evaluations.run(step, state) if early else None
            stopping = stop.value
            if last or stopping or self.checkpoints.wants(step, score):
                self.save(step, state, score, last=last)
            if due and not (early or stopping):
                self.checkpoints.note_score(step, self.evaluations.run(step, state))
            stopping = stopping or (stop.at_the_end() if last else None)
            if stopping:
                raise InterruptedRun(f"interrupted at step {step} of stage {self.stage.name!r}", stopping)

    def save(self, step, state, score, *, last):
        """Start to write a checkpoint; wait for the end of the write if no other checkpoint follows."""
        self.observers.watch.ended()
        self.observers.metrics_file.flush()
        with self.observers.heartbeat.doing("saving"):
            if last or self.stop.value:
                # A function, because a signal may arrive during the write.
                patience = lambda: STOPPING_PATIENCE if self.stop.value else LAST_PATIENCE  # noqa: E731
                self.checkpoints.save_surely(step, state, self.feed, score, patience=patience)
            else:
                self.checkpoints.save(step, state, self.feed, score)


@dataclasses.dataclass(frozen=True)
class _Observers:
    """The objects that observe every step."""

    clock: Clock
    watch: health.Watch
    heartbeat: heartbeat.Heartbeat
    metrics_file: logs.Metrics
    progress: logs.Progress

    def began(self, step, metrics):
        """Register a step that has begun and its future metrics."""
        self.clock.tick(metrics)
        self.watch.began(step, metrics)
        self.heartbeat.beat(step)

    def log(self, step, metrics):
        """Write the step's metrics. Only here and before a checkpoint does the host wait for the newest step."""
        self.watch.ended()
        self.metrics_file.write(step, {**metrics, **self.clock.read()})
        self.progress.update(step, _note(metrics))


def _begin(stage, checkpoints, abstract, feed, key):
    """Return (step, state) of the newest undamaged checkpoint, with `feed` moved to it; or step 0 and a new state."""
    start = checkpoints.newest_whole()
    if start is not None:
        logs.say(f"{stage.name}: resuming from step {start}")
        return start, checkpoints.restore(start, abstract, feed)
    if "params" in abstract:
        with contextlib.suppress(ImportError):  # the table needs clu
            from clu import parameter_overview

            logs.say(parameter_overview.get_parameter_overview(abstract["params"], include_stats=False))
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.jit(stage.init, out_shardings=placed)(key)
    return 0, stage.begin(state) if stage.begin else state


def compiled_step(step, placed, mesh):
    """Return the jitted step as the loop runs it: with a key for each step, and the old state donated."""

    def with_key(state, frozen, batch, key):
        return step(state, frozen, batch, jax.random.fold_in(key, state["step"]))

    return sharding.jit(with_key, mesh, out_shardings=(placed, sharding.replicated(mesh)), donate_argnums=0)


def _note(metrics):
    names = sorted(metrics, key=lambda name: (name != "loss", name))[:3]
    return " ".join(f"{name} {float(metrics[name]):.4g}" for name in names)


class _Feed:
    """Batches on the devices, with one batch of prefetch; its position counts the batches that were taken."""

    def __init__(self, iterator, mesh):
        self._iterator, self._mesh = iterator, mesh
        self._fetched, self._position = None, iterator.get_state()

    def fetch(self):
        """Start the transfer of the next batch to the devices; return its arrays, which may not be ready."""
        self._fetched = sharding.put_batch(next(self._iterator), self._mesh)
        return self._fetched

    def take(self):
        """Return the fetched batch."""
        batch, self._fetched = self._fetched, None
        self._position = self._iterator.get_state()
        return batch

    def get_state(self):
        return self._position

    def set_state(self, position):
        self._iterator.set_state(position)
        self._fetched, self._position = None, position

    def close(self):
        self._iterator.close()


class _Evaluations:
    """Evaluations in training, every `every` steps."""

    def __init__(self, evaluate, every, metrics_file, beats, clock):
        self._evaluate, self._every = evaluate, every
        self._metrics_file, self._heartbeat, self._clock = metrics_file, beats, clock

    def due(self, step):
        """Return whether an evaluation follows `step`."""
        return bool(self._every and step and step % self._every == 0)

    def run(self, step, state):
        """Evaluate, write the results, and return their score or None."""
        with self._heartbeat.doing("evaluating"):
            results = self._evaluate(state, step)
        score = results.pop("score", None)
        self._metrics_file.write(step, {f"eval/{name}": value for name, value in results.items()})
        self._clock.read()  # the time of the evaluation does not count for the steps
        return score


class _Signals:
    """Handler of SIGINT and SIGTERM: the first signal is stored as `received`, a second one ends the process at once.

    A checkpoint that is being written then does not count; complete checkpoints stay.
    """

    def __enter__(self):
        self.received = None
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        self.received = number
        for other in self._previous:
            signal.signal(other, signal.SIG_DFL)
        logs.say("stopping after this step and a checkpoint; send the signal again to stop at once")
