"""Collect rows into numbers over seeds, and say in words whether they support a claim."""

import statistics

NOT_RUN = "not run"


def metric_of(generator, metric):
    """Return the name under which a generator's metric is kept."""
    return f"{generator}_{metric}" if generator else metric


def last(found):
    """Return {(variant, metric): {seed: value}} at the end of the runs. `found`: {(variant, seed): rows}."""
    values = {}
    for (variant, seed), rows in found.items():
        for row in rows:
            if row["step"] == 0:
                values.setdefault((variant, row["metric"]), {})[seed] = row["value"]
    return values


def by_step(found, metric):
    """Return {variant: {step: {seed: value}}} of the kept checkpoints."""
    values = {}
    for (variant, seed), rows in found.items():
        for row in rows:
            if row["step"] and row["metric"] == metric:
                values.setdefault(variant, {}).setdefault(row["step"], {})[seed] = row["value"]
    return values


def mean_and_spread(by_seed):
    """Return (mean, sample standard deviation or None for a single seed, number of seeds)."""
    values = list(by_seed.values())
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def verdict(values, comparison):
    """Say whether all variants of comparison['lower'] are below all of comparison['higher'].

    Returns 'in every seed', 'on average' (the means have this order) or 'does not show', each with the number of seeds
    that have this order; or 'not run' when no seed has all variants. An entry is a variant, or (variant, metric).
    """
    lower, higher = ([_values(values, comparison, entry) for entry in comparison[side]] for side in ("lower", "higher"))
    seeds = sorted(set.intersection(*(set(of) for of in (*lower, *higher))))
    if not seeds:
        return NOT_RUN
    shown = sum(max(of[seed] for of in lower) < min(of[seed] for of in higher) for seed in seeds)
    low, high = ([statistics.fmean(of[seed] for seed in seeds) for of in side] for side in (lower, higher))
    if shown == len(seeds):
        words = "in every seed"
    elif max(low) < min(high):
        words = "on average"
    else:
        words = "does not show"
    return f"{words} ({shown} of {len(seeds)})"


def _values(values, comparison, entry):
    key = (entry, comparison["metric"]) if isinstance(entry, str) else tuple(entry)
    return values.get(key, {})
