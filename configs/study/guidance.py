"""Compare no guidance, classifier-free guidance and AutoGuidance at several scales.

    python -m launch.study --only=guidance

base.py explains the keys.
"""

from configs.study import base

_CFG, _AUTO = (1.5, 2.5), (1.5, 2.5)


def _compare():
    """Return the comparisons of the experiment."""
    return [
        {
            "says": "AutoGuidance at 1.5 lowers fd against none",
            "metric": "fd",
            "lower": ["autoguidance 1.5"],
            "higher": ["none"],
        },
        {
            "says": "AutoGuidance at 1.5 has a lower fd than classifier-free guidance at 1.5",
            "metric": "fd",
            "lower": ["autoguidance 1.5"],
            "higher": ["cfg 1.5"],
        },
        {
            "says": "classifier-free guidance at 2.5 raises agreement against none",
            "metric": "agreement",
            "lower": ["none"],
            "higher": ["cfg 2.5"],
        },
    ]


def get_config():
    cfg, auto = ([f"{name} {scale}" for scale in scales] for name, scales in (("cfg", _CFG), ("autoguidance", _AUTO)))
    return {
        "title": "AutoGuidance, classifier-free guidance, none",
        "claim": "With guidance by a weaker model (AutoGuidance), samples are closer to the data than without guidance "
        "and than with classifier-free guidance, which gains agreement with the label and loses variety.",
        "paper": [
            ("DiT^DH-XL, 800 epochs, 256 px: no guidance, FID", "1.51"),
            ("AutoGuidance, scale 1.42", "1.13"),
        ],
        "config": {**base.MAIN_DIT, "dit.head_depth": 2},
        "variants": {
            "none": {"guidance.scale": 1.0},
            **{
                name: {"guidance.method": "cfg", "guidance.scale": scale} for name, scale in zip(cfg, _CFG, strict=True)
            },
            **{
                name: {
                    "guidance.method": "autoguidance",
                    "guidance.scale": scale,
                    "guidance.dit.weights": "@weak",
                }
                for name, scale in zip(auto, _AUTO, strict=True)
            },
        },
        "sizes": {
            "fast": {
                "dit.weights": "@weak",
                "dit.head_depth": 1,
                "guidance.dit.width": 16,
                "guidance.dit.depth": 1,
                "guidance.dit.num_heads": 1,
                "guidance.dit.head_width": 16,
                "guidance.dit.head_depth": 1,
                "guidance.dit.head_num_heads": 1,
            }
        },
        "measure": ("generation", "flops"),
        "compare": _compare(),
        "columns": ["fd", "agreement", "sampling_gflops"],
        "plots": [
            {"y": y, "x": "guidance.scale", "series": {"cfg": ["none", *cfg], "autoguidance": ["none", *auto]}}
            for y in ("fd", "agreement")
        ],
        "note": "Samples of the main DiT; the weak model is the same DiT after 300 steps. Each seed has other noise.",
    }
