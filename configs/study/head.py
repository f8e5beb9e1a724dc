"""Compare a plain DiT, a DiT with a wide shallow head, and a plain DiT of the same FLOPs.

    python -m launch.study --only=head

base.py explains the keys.
"""

from configs.study import base


def _head(width, depth):
    return {"dit.head_width": width, "dit.head_depth": depth, "dit.head_num_heads": 4}


def get_config():
    plain = {"dit.head_depth": 0}
    return {
        "title": "The wide head (DiT^DH)",
        "claim": "A shallow wide head on a narrow trunk beats a plain DiT of the same FLOPs.",
        "paper": [
            ("DiT-XL on RAE at 80 epochs, gFID", "4.28"),
            ("DiT^DH-XL", "2.16"),
            ("DiT^DH-B", "3.38"),
            ("DiT^DH-S", "6.07"),
            ("DiT^DH-XL at 20 epochs", "3.71"),
        ],
        "config": {
            "stages": ("dit",),
            "dit.train.num_steps": 450,
            **base.kept_every(150),
        },
        "variants": {
            "plain, width 64": {**plain},
            "plain, width 104": {**plain, "dit.width": 104},
            "head 128 x 1": _head(128, 1),
            "head 128 x 2": _head(128, 2),
            "head 64 x 2": _head(64, 2),
        },
        "sizes": {"fast": base.kept_every(2), "large": base.kept_every(10_000)},
        "measure": ("loss", "flops", "generation"),
        "compare": [
            {
                "says": "head 128 x 1 has a lower fd than the plain DiT of equal FLOPs",
                "metric": "fd",
                "lower": ["head 128 x 1"],
                "higher": ["plain, width 104"],
            },
            {
                "says": "head 128 x 1 has a lower fd than the same trunk without",
                "metric": "fd",
                "lower": ["head 128 x 1"],
                "higher": ["plain, width 64"],
            },
            {
                "says": "a head as wide as 128 beats one of 64",
                "metric": "fd",
                "lower": ["head 128 x 2"],
                "higher": ["head 64 x 2"],
            },
        ],
        "columns": ["fd", "agreement", "loss", "forward_gflops"],
        "plots": [
            {"y": "fd", "x": "training_gflops", "by_step": True},
            {"y": "fd", "x": "step", "by_step": True},
        ],
        "note": "All have depth 4. A token has 64 numbers, so the plain DiT of width 64 is just wide enough.",
    }
