"""Train plain DiTs of several widths on one image: only a DiT as wide as the tokens can learn it.

    python -m launch.study --only=width

base.py explains the keys.
"""


def _sizes(width, depth=4):
    return {"dit.width": width, "dit.num_heads": max(1, width // 32), "dit.depth": depth}


def _compare():
    """Return the comparisons of the experiment."""
    return [
        {
            "says": "width 64 and 128 reach a lower loss than any narrower DiT",
            "metric": "loss",
            "lower": ["64", "128"],
            "higher": ["16", "32", "32, twice the depth"],
        },
        {
            "says": "twice the depth at width 32 does not bring the loss below (D - d) / D = 0.5",
            "metric": "loss",
            "lower": [("32, twice the depth", "bound")],
            "higher": ["32, twice the depth"],
        },
        *(
            {
                "says": f"the loss of width {width} is above the bound by eigenvalues",
                "metric": "loss",
                "lower": [(str(width), "eigenvalue_bound")],
                "higher": [str(width)],
            }
            for width in (16, 32)
        ),
    ]


def get_config():
    return {
        "title": "Width of the DiT against the dimension of a token",
        "claim": "A DiT narrower than a token (here D = 64) cannot overfit a single image, however deep it is: for a "
        "width d < D the loss stays above (D - d) / D. From width D on it decreases.",
        "paper": [
            ("DINOv2-S (D = 384): DiT-S / B / L, width 384 / 768 / 1024, final loss", "0.036 / 0.0010 / 0.00097"),
            ("DINOv2-B (D = 768)", "0.52 / 0.024 / 0.0013"),
            ("DINOv2-L (D = 1024)", "0.65 / 0.27 / 0.022"),
            ("twice the depth (12 to 24) at width < D", "does not help"),
        ],
        "config": {
            "stages": ("dit",),
            "data.source": "image_folder",
            "data.path": "@image",
            "data.heldout_path": "@image",
            "data.num_classes": 1,
            "judge.weights": "",
            "log_every": 5,
            "dit.head_depth": 0,
            "dit.train.num_steps": 800,
            "dit.train.optimizer": "adamw",
            "dit.train.learning_rate": 2e-3,
            "dit.train.time_mean": 0.0,
            "dit.train.time_std": 1.0,
        },
        "variants": {
            "16": _sizes(16),
            "32": _sizes(32),
            "32, twice the depth": _sizes(32, 8),
            "64": _sizes(64),
            "128": _sizes(128),
        },
        "sizes": {"fast": {"dit.head_depth": 0, "dit.train.num_steps": 60, "dit.train.learning_rate": 5e-3}},
        "measure": ("loss", "bounds"),
        "compare": _compare(),
        "columns": ["loss", "bound", "eigenvalue_bound"],
        "plots": [
            {
                "y": "loss",
                "x": "width",
                "series": {"depth 4": ["16", "32", "64", "128"], "depth 8": ["32, twice the depth"]},
                "also": ["bound", "eigenvalue_bound"],
            }
        ],
        "note": "loss: mean of the last tenth of training. bound: (D - d) / D; eigenvalue_bound: the sum of the "
        "eigenvalues of Cov(noise - x) over the image's tokens beyond the d-th, over D. A seed changes the "
        "initialisation, the noise and the times.",
    }
