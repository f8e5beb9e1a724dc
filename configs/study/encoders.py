"""Compare a trained encoder with a random one, and its last layer with the mean of several.

    python -m launch.study --only=encoders

base.py explains the keys.
"""

from configs.study import base

_LAYERS = {"encoder.layers": (1, 3, 5)}
_ALL = {"encoder.layers": (0, 1, 2, 3, 4, 5)}


def _compare():
    """Return the comparisons of the experiment."""
    return [
        {
            "says": "trained weights give a lower fd than random ones",
            "metric": "fd",
            "lower": ["trained, last layer"],
            "higher": ["random weights"],
        },
        {
            "says": "trained weights reconstruct better than random ones (psnr)",
            "metric": "psnr",
            "lower": ["random weights"],
            "higher": ["trained, last layer"],
        },
        {
            "says": "several layers reconstruct better than the last (psnr)",
            "metric": "psnr",
            "lower": ["trained, last layer"],
            "higher": ["trained, mean of three layers"],
        },
        {
            "says": "several layers give a lower fd than the last",
            "metric": "fd",
            "lower": ["trained, mean of three layers"],
            "higher": ["trained, last layer"],
        },
        {
            "says": "all layers reconstruct better than three (psnr)",
            "metric": "psnr",
            "lower": ["trained, mean of three layers"],
            "higher": ["trained, mean of all six layers"],
        },
        {
            "says": "the linear probe reads more from trained weights, pooled",
            "metric": "probe_pooled",
            "lower": ["random weights"],
            "higher": ["trained, last layer"],
        },
    ]


def get_config():
    return {
        "title": "Encoders: trained or random, last layer or several",
        "claim": "Generation is good because the encoder is pretrained; the mean of several layers keeps more detail.",
        "paper": [
            ("rFID: MAE-B / DINOv2-B / SigLIP2-B", "0.16 / 0.49 / 0.53"),
            ("linear probe of these encoders", "68.0 / 84.5 / 79.1 %"),
            ("follow-up (2605.18324), DINOv3-L: last layer, rFID and PSNR", "0.60, 18.9"),
            ("mean of seven layers", "0.29, 22.6"),
        ],
        "foundations": {
            # One step at the start of the warm-up, with a rate of 0: the weights stay as initialised.
            "random_encoder": {
                "config": {
                    "stages": ("encoder", "statistics"),
                    "data.num_train": 2_000,
                    "encoder.train.num_steps": 1,
                },
                "sizes": {"fast": {"encoder.train.num_steps": 1}},
            },
            **{
                name: {"config": {**layers, "stages": ("statistics",), "data.num_train": 2_000}}
                for name, layers in (("layers", _LAYERS), ("all_layers", _ALL))
            },
        },
        "config": {"stages": ("decoder", "dit"), **base.DECODER, "dit.train.num_steps": 400},
        "variants": {
            "trained, last layer": {},
            "random weights": {"encoder.weights": "@random_encoder", "statistics.weights": "@random_encoder"},
            "trained, mean of three layers": {**_LAYERS, "statistics.weights": "@layers"},
            "trained, mean of all six layers": {**_ALL, "statistics.weights": "@all_layers"},
        },
        "sizes": {"fast": {}},
        "measure": ("reconstruction", "probe", "generation"),
        "compare": _compare(),
        "columns": ["fd", "agreement", "psnr", "rfd", "probe_pooled", "probe_whole"],
        "plots": [{"y": "fd"}, {"y": "psnr"}, {"y": "probe_pooled"}],
        "note": "Each encoder and seed has a decoder and a DiT of its own. fd and rfd use the features of the trained "
        "encoder for all.",
    }
