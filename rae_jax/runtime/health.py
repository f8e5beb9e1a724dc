"""What is not as it should be while a stage trains: losses that are not finite, or leap. It knows no loss by heart."""

import collections
import dataclasses
import datetime
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.runtime import atomic_files, logs

WINDOW, ENOUGH = 200, 50  # losses that a new one is compared with: at most, at least
SHOWN = 8  # images of a batch that the terminal names; incidents.jsonl has all


class DivergedRun(Exception):
    """A metric was not finite; no checkpoint of that was written."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """config.health; 0 turns each of them off."""

    skip: int = 0
    spike: float = 0.0
    stalled: float = 0.0
    heartbeat: float = 0.0


OFF = Settings()


def guarded(step, skip):
    """A stage's `step`, or with `skip` one that leaves the state as it was, but for its count, where it is not finite.

    A gradient that is not finite shows in its norm, which every stage has among its metrics.
    """
    if not skip:
        return step

    def guarded_step(state, frozen, batch, key):
        new, metrics = step(state, frozen, batch, key)
        finite = jnp.stack([jnp.isfinite(value).all() for value in metrics.values()]).all()
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return {**kept, "step": new["step"]}, metrics

    return guarded_step


class Watch:
    """Looks at every step's metrics once it has ended, so that nothing waits for them.

    `good()` says where to go on from. All processes see the same.
    """

    def __init__(self, stage, settings, incidents, good):
        self._stage, self._places = stage.name, stage.batches.places_of_step
        self._settings, self._incidents, self._good = settings, incidents, good
        self._unseen, self._skipped, self._hushed = None, 0, 0
        self._losses = collections.deque(maxlen=WINDOW)

    def began(self, step, metrics):
        """A step has begun that will give these metrics; the one before has ended. Raises DivergedRun."""
        self.ended()
        self._unseen = step, metrics

    def ended(self):
        """Wait for the newest step. Raises DivergedRun where it is not finite, and no more may be skipped."""
        if self._unseen is not None:
            (step, metrics), self._unseen = self._unseen, None
            self._judge(step, {name: float(value) for name, value in jax.device_get(metrics).items()})

    def _judge(self, step, metrics):
        if all(map(np.isfinite, metrics.values())):
            self._skipped = 0
            self._compare(step, metrics)
            return
        self._skipped += 1
        values = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        batch = self._report("not finite", step, metrics)
        if self._skipped > self._settings.skip:
            in_a_row = f" for the {self._skipped}th time in a row" if self._settings.skip else ""
            raise DivergedRun(
                f"stage {self._stage!r} stopped at step {step}, where not all is finite{in_a_row}: {values}; {batch}; "
                f"{self._good()}"
            )
        logs.say(
            f"{self._stage}: the update of step {step} is left out, as not all is finite: {values}; {batch} "
            f"({self._skipped} in a row, {self._settings.skip} may be)"
        )

    def _compare(self, step, metrics):
        """Report a loss that lies far above the recent ones: as far as `spike` times their interquartile range."""
        loss = metrics.get("loss")
        if loss is None or not self._settings.spike:
            return
        if len(self._losses) >= ENOUGH and step >= self._hushed:
            low, median, high = statistics.quantiles(self._losses, n=4)
            spread = max(high - low, 1e-3 * abs(median))
            if loss - median > self._settings.spike * spread:
                batch = self._report("spike", step, metrics)
                logs.say(f"{self._stage}: the loss leaps at step {step}: {loss:.4g}, lately {median:.4g}; {batch}")
                self._hushed = step + ENOUGH
        self._losses.append(loss)

    def _report(self, kind, step, metrics):
        """Write an incident; returns the batch in words."""
        epoch, indices = self._places(step)
        numbers = {name: value if np.isfinite(value) else str(value) for name, value in metrics.items()}
        self._incidents.write(kind, step=step, metrics=numbers, epoch=epoch, images=indices)
        more = f" and {len(indices) - SHOWN} more" if len(indices) > SHOWN else ""
        return f"images {' '.join(map(str, indices[:SHOWN]))}{more} of epoch {epoch}"


class Incidents:
    """Appends to incidents.jsonl what was not as it should be; a run never fails for it."""

    def __init__(self, workdir, stage):
        self._path, self._stage = workdir / "incidents.jsonl", stage

    def write(self, kind, **what):
        """One line: the time, the stage, the kind, and what there is to know."""
        if jax.process_index() != 0:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            line = {"time": now, "stage": self._stage, "kind": kind, **what}
            atomic_files.append_text(self._path, json.dumps(line) + "\n")
        except Exception as error:  # of many kinds, where a bucket is away
            logs.say(f"cannot write to {self._path} ({atomic_files.reason(error)})")
