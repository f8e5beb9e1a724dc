"""Compare a student of one to fifty steps with its teacher's solvers, and with a DiT that predicts data.

    python -m launch.study --only=few_step

base.py explains the keys.
"""

from configs.study import base

VELOCITY, DATA = "velocity, with a student", "data"
_STEPS = {"euler": (1, 2, 5, 10, 25, 50), "heun": (1, 2, 5, 10, 25), "student": (1, 2, 5, 10, 25, 50)}
_METHODS = {"student": "mean_velocity"}


def _name(solver, steps):
    """Return the generator's name; 50 Euler steps are the default."""
    return "" if (solver, steps) == ("euler", 50) else f"{solver} {steps}"


def _samplers(*solvers):
    """Return {name: changes} of all numbers of steps of these solvers."""
    return {
        _name(solver, n): {"sampler.method": _METHODS.get(solver, solver), "sampler.num_steps": n}
        for solver in solvers
        for n in _STEPS[solver]
    }


def _compare():
    """Return the comparisons of the experiment."""

    def order(says, lower, higher):
        return {"says": says, "metric": "fd", "lower": [lower], "higher": [higher]}

    one = (VELOCITY, "student 1_fd")
    return [
        order("one step of the student has a lower fd than 10 Euler steps", one, (VELOCITY, "euler 10_fd")),
        order("it has a lower fd than 2 Heun steps", one, (VELOCITY, "heun 2_fd")),
        order("two steps of it have a lower fd than one", (VELOCITY, "student 2_fd"), one),
        order("50 Euler steps have a lower fd than one step of it", VELOCITY, one),
        order("data give a lower fd than velocity in 2 Euler steps", (DATA, "euler 2_fd"), (VELOCITY, "euler 2_fd")),
        order("one step of the student has a lower fd than 5 Euler steps of data", one, (DATA, "euler 5_fd")),
    ]


def get_config():
    lines = {
        f"{variant}, {solver}": (variant, {n: _name(solver, n) for n in _STEPS[solver]})
        for variant, solvers in ((VELOCITY, ("euler", "heun", "student")), (DATA, ("euler", "heun")))
        for solver in solvers
    }
    return {
        "title": "One step instead of fifty",
        "claim": "A student of the mean velocity draws in one step what its teacher draws in many; a DiT that predicts "
        "data is good in a few steps without a student.",
        "paper": [
            ("MF-RAE (2511.13019), DiT^DH-XL: one step, two steps, gFID", "2.03, 1.89"),
            ("RiT, data as output: 10 Heun steps, 5 Heun steps", "1.27, about 2.0"),
        ],
        "config": {
            **base.MAIN_DIT,
            **{"dit.base_depth": 1, "dit.train.num_steps": 1_500},
            **{"guidance.method": "internal", "guidance.scale": 3.0, "guidance.t_min": 0.1, "sampler.num_steps": 50},
            **{
                "few_step.guided": True,
                "few_step.train.ema_decay": 0.99,
                "few_step.train.num_steps": 600,
                "few_step.train.warmup_steps": 50,
            },
            "evaluate.num_images": 200,
        },
        "variants": {
            VELOCITY: {"stages": ("dit", "few_step")},
            DATA: {"stages": ("dit",), "dit.prediction": "data_in_velocity"},
        },
        "sizes": {"fast": {"dit.depth": 2, "few_step.train.num_steps": 4, "few_step.train.batch_size": 8}},
        "measure": ("flops", "generation", "speed"),
        "generators": _samplers("euler", "heun"),
        "generators_of": {VELOCITY: _samplers("student")},
        "compare": _compare(),
        "columns": ["fd", "agreement", "seconds_per_image", "forward_gflops"],
        "columns_of_generators": ["fd", "agreement", "seconds_per_image"],
        "plots": [
            {"y": y, "over": "number of steps", "log": log, "lines": lines}
            for y, log in (("fd", "xy"), ("agreement", "x"))
        ],
        "note": "Internal guidance at 3 for all solvers; the student learned it. Heun's steps take two passes each. "
        "Each seed trains a DiT of its own, and the student after it.",
    }
