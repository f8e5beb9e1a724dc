"""From rows to numbers over seeds, and from those to words: does a claim show?"""

import statistics

NOT_RUN = "not run"


def last(found):
    """{(variant, metric): {seed: value}} of the runs as they ended. `found`: {(variant, seed): rows}."""
    values = {}
    for (variant, seed), rows in found.items():
        for row in rows:
            if row["step"] == 0:
                values.setdefault((variant, row["metric"]), {})[seed] = row["value"]
    return values


def by_step(found, metric):
    """{variant: {step: {seed: value}}} of the checkpoints before the end."""
    values = {}
    for (variant, seed), rows in found.items():
        for row in rows:
            if row["step"] and row["metric"] == metric:
                values.setdefault(variant, {}).setdefault(row["step"], {})[seed] = row["value"]
    return values


def mean_and_spread(by_seed):
    """(mean, sample standard deviation or None of a single seed, number of seeds)."""
    values = list(by_seed.values())
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def verdict(values, comparison):
    """How far all variants of comparison['lower'] are below all of comparison['higher'], seed by seed, in words.

    'in every seed', 'on average' (the means are in that order), 'does not show', each with how many seeds are; or 'not
    run', where no seed has all of them. Entries are variants, of comparison['metric'], or (variant, metric).
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
