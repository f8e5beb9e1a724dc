"""Compare velocity, data and RAEv2's network at equal FLOPs, over few and many steps, and all kinds of guidance.

    python -m launch.study --only=raev2

base.py explains the keys.
"""

from configs.study import base

VELOCITY, DATA, RAEV2 = "DiT^DH, velocity", "DiT^DH, data", "RAEv2's DiT"
_STEPS = (5, 10, 25, 50)
_SCALES = {"cfg": (1.5, 2.5), "autoguidance": (1.5, 2.5), "internal": (1.5, 2.0, 3.0), "both": (1.25, 1.5)}
_DATA = {"dit.prediction": "data_in_velocity"}
# Of equal FLOPs with the main DiT and its head of 128 x 2.
_RAEV2 = {"dit.width": 88, "dit.num_heads": 2, "dit.conditioning": "in_context", "dit.qk_norm": True, **_DATA}
_BASE = {"dit.base_depth": 1}
_GUIDE_IN_TESTS = {
    **{"guidance.dit.width": 16, "guidance.dit.depth": 2, "guidance.dit.num_heads": 1},
    **{"guidance.dit.head_width": 16, "guidance.dit.head_depth": 1, "guidance.dit.head_num_heads": 1},
}


def _name(method, steps):
    """Return the generator's name; 25 Euler steps are the default."""
    return "" if (method, steps) == ("euler", 25) else f"{method} {steps}"


def _samplers():
    """Return {name: changes} of all numbers of steps of both solvers."""
    return {
        _name(method, n): {"sampler.method": method, "sampler.num_steps": n}
        for method in ("euler", "heun")
        for n in _STEPS
    }


def _guidances(*methods):
    """Return {name: changes} of these kinds of guidance, each at its scales, with 25 Euler steps."""
    return {f"{method} {scale}": _guidance(method, scale) for method in methods for scale in _SCALES[method]}


def _guidance(method, scale):
    whole = {"guidance.method": method, "guidance.scale": scale, "guidance.t_min": 0.0}
    match method:
        case "internal":
            return {**whole, "guidance.t_min": 0.1}
        case "autoguidance":
            return {**whole, "guidance.dit.weights": "@weak_raev2"}
        case "both":
            return {**whole, "guidance.method": "internal_cfg", "guidance.internal.scale": 1.5}
    return whole


def _compare():
    """Return the comparisons of the experiment."""

    def order(says, lower, higher):
        return {"says": says, "metric": "fd", "lower": [lower], "higher": [higher]}

    return [
        order("data give a lower fd than velocity in 5 Euler steps", (DATA, "euler 5_fd"), (VELOCITY, "euler 5_fd")),
        order("the same in 50 Euler steps", (DATA, "euler 50_fd"), (VELOCITY, "euler 50_fd")),
        order("RAEv2's DiT has a lower fd than DiT^DH with data", (RAEV2, "euler 50_fd"), (DATA, "euler 50_fd")),
        order("10 Heun steps have a lower fd than 25 Euler steps", (RAEV2, "heun 10_fd"), RAEV2),
        order("internal guidance at 1.5 lowers fd", (RAEV2, "internal 1.5_fd"), RAEV2),
        order("it does so for DiT^DH with velocity", (VELOCITY, "internal 1.5_fd"), VELOCITY),
        order("it has a lower fd than AutoGuidance at 1.5", (RAEV2, "internal 1.5_fd"), (RAEV2, "autoguidance 1.5_fd")),
        order("internal guidance lowers the fd of CFG at 1.5", (RAEV2, "both 1.5_fd"), (RAEV2, "cfg 1.5_fd")),
    ]


def _plots():
    """Return the panels: fd over the number of steps, then fd and agreement over the scale."""
    steps = {
        f"{variant}, {method}": (variant, {n: _name(method, n) for n in _STEPS})
        for variant in (VELOCITY, DATA, RAEV2)
        for method in ("euler", "heun")
    }
    scales = {
        name: (RAEV2, {1.0: "", **{scale: f"{name} {scale}" for scale in values}})
        for name, values in _SCALES.items()
        if name != "both"
    }
    scales |= {f"internal, {variant}": (variant, scales["internal"][1]) for variant in (VELOCITY, DATA)}
    scales["cfg, with internal guidance at 1.5"] = (
        RAEV2,
        {1.0: "internal 1.5", **{scale: f"both {scale}" for scale in _SCALES["both"]}},
    )
    return [
        {"y": "fd", "over": "number of steps", "lines": steps},
        *({"y": y, "over": "scale", "lines": scales} for y in ("fd", "agreement")),
    ]


def get_config():
    return {
        "title": "RAEv2: data as output, time and label in context, guidance from within",
        "claim": "A DiT that predicts data, with time and label as tokens, learns faster; its own base output guides "
        "it as well as a second model does, at no cost; and few steps suffice.",
        "paper": [
            ("RAEv2 (2605.18324), 80 epochs: no guidance, gFID", "1.65"),
            ("CFG / AutoGuidance / internal guidance", "1.49 / 1.14 / 1.06"),
            ("RAE at 800 epochs: none / AutoGuidance", "1.51 / 1.13"),
        ],
        "foundations": {
            "weak_raev2": {
                "config": {"stages": ("dit",), "dit.train.num_steps": 300, **_BASE, **_RAEV2},
                "sizes": {"fast": {"dit.depth": 2}},
            }
        },
        "config": {
            **base.MAIN_DIT,
            "stages": ("dit",),
            **_BASE,
            **{f"guidance.{key}": value for key, value in (_BASE | _RAEV2).items() if key not in _DATA},
            "dit.train.num_steps": 1_500,
            "evaluate.num_images": 200,
        },
        "variants": {VELOCITY: {}, DATA: _DATA, RAEV2: _RAEV2},
        "sizes": {"fast": {"dit.depth": 2, **_GUIDE_IN_TESTS}},
        "measure": ("loss", "flops", "generation"),
        "generators": _samplers() | _guidances("internal"),
        "generators_of": {RAEV2: _guidances("cfg", "autoguidance", "both")},
        "compare": _compare(),
        "columns": ["fd", "agreement", "loss", "forward_gflops"],
        "columns_of_generators": ["fd", "agreement"],
        "plots": _plots(),
        "note": "Networks of equal FLOPs, each trained for itself with each seed. loss: of the velocity in all three, "
        "output and base output together. Guidance: 25 Euler steps; the weak model is RAEv2's DiT after 300 steps.",
    }
