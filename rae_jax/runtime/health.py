"""Detection of failures of a stage in training: metrics that are not finite, and loss spikes, of any loss."""

import collections
import dataclasses
import datetime
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.runtime import atomic_files, logs

WINDOW, ENOUGH = 200, 50  # recent losses that a new loss is compared with: at most, at least
SHOWN = 8  # images of a batch that the terminal lists; incidents.jsonl lists all


class DivergedRun(Exception):
    """A metric was not finite; no checkpoint of that state was written."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of config.health; 0 turns a check off."""

    skip: int = 0
    spike: float = 0.0
    stalled: float = 0.0
    heartbeat: float = 0.0


OFF = Settings()


def guarded(step, skip):
    """Return a stage's `step`; with `skip`, a step whose metrics are not finite changes only the step count.

    Every stage reports the gradient's norm among its metrics, which shows a gradient that is not finite.
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
    """Check of every step's metrics after the step has ended, so that the devices never wait for it.

    `describe_checkpoint()` returns the newest checkpoint in words. All processes see the same metrics.
    """

    def __init__(self, stage, settings, incidents, describe_checkpoint):
        self._stage, self._places = stage.name, stage.batches.places_of_step
        self._settings, self._incidents, self._describe_checkpoint = settings, incidents, describe_checkpoint
        self._unchecked, self._skipped, self._quiet_until = None, 0, 0
        self._losses = collections.deque(maxlen=WINDOW)

    def began(self, step, metrics):
        """Register a step that has begun and its future metrics; check the step before it. Raises DivergedRun."""
        self.ended()
        self._unchecked = step, metrics

    def ended(self):
        """Wait for the newest step and check it. Raises DivergedRun if it is not finite and may not be skipped."""
        if self._unchecked is not None:
            (step, metrics), self._unchecked = self._unchecked, None
            self._check(step, {name: float(value) for name, value in jax.device_get(metrics).items()})

    def _check(self, step, metrics):
        if all(map(np.isfinite, metrics.values())):
            self._skipped = 0
            self._compare(step, metrics)
            return
        self._skipped += 1
        values = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        batch = self._report("not finite", step, metrics)
        if self._skipped > self._settings.skip:
            in_a_row = f" in {self._skipped} steps in a row" if self._settings.skip else ""
            raise DivergedRun(
                f"stage {self._stage!r} stopped at step {step}, metrics are not finite{in_a_row}: {values}; {batch}; "
                f"{self._describe_checkpoint()}"
            )
        logs.say(
            f"{self._stage}: the update of step {step} is skipped, metrics are not finite: {values}; {batch} "
            f"({self._skipped} in a row; config.health.skip={self._settings.skip} allows {self._settings.skip})"
        )

    def _compare(self, step, metrics):
        """Report a loss above the median of recent losses by more than `spike` times their interquartile range."""
        loss = metrics.get("loss")
        if loss is None or not self._settings.spike:
            return
        if len(self._losses) >= ENOUGH and step >= self._quiet_until:
            low, median, high = statistics.quantiles(self._losses, n=4)
            spread = max(high - low, 1e-3 * abs(median))
            if loss - median > self._settings.spike * spread:
                batch = self._report("spike", step, metrics)
                logs.say(f"{self._stage}: loss spike at step {step}: {loss:.4g}, recent median {median:.4g}; {batch}")
                self._quiet_until = step + ENOUGH
        self._losses.append(loss)

    def _report(self, kind, step, metrics):
        """Write an incident; return the images of its batch in words."""
        epoch, indices = self._places(step)
        numbers = {name: value if np.isfinite(value) else str(value) for name, value in metrics.items()}
        self._incidents.write(kind, step=step, metrics=numbers, epoch=epoch, images=indices)
        more = f" and {len(indices) - SHOWN} more" if len(indices) > SHOWN else ""
        return f"images {' '.join(map(str, indices[:SHOWN]))}{more} of epoch {epoch}"


class Incidents:
    """Writer of WORKDIR/incidents.jsonl; if it cannot be written, the run continues."""

    def __init__(self, workdir, stage):
        self._path, self._stage = workdir / "incidents.jsonl", stage

    def write(self, kind, **details):
        """Append one line: the time, the stage, the kind and the details."""
        if jax.process_index() != 0:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            line = {"time": now, "stage": self._stage, "kind": kind, **details}
            atomic_files.append_text(self._path, json.dumps(line) + "\n")
        except Exception as error:  # of many kinds, if a bucket cannot be reached
            logs.say(f"cannot write to {self._path} ({atomic_files.reason(error)})")
