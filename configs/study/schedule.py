"""Compare noise schedules with and without the shift by the latent's dimension, at three dimensions.

    python -m launch.study --only=schedule

base.py explains the keys.
"""

from configs.study import base

_DIMENSIONS = {16: 1024, 64: 4096, 256: 16384}  # {dimension of a token: dimension of an 8x8 latent}


def _encoder(width):
    return {"encoder.width": width, "encoder.num_heads": max(1, width // 32), "encoder.depth": 2}


def _foundation(width):
    return {
        "config": {
            **_encoder(width),
            "stages": ("encoder", "decoder", "statistics"),
            "data.num_train": 5_000,
            "encoder.train.num_steps": 400,
            "encoder.train.batch_size": 32,
            "encoder.train.warmup_steps": 50,
            "encoder.train.ema_decay": 0.98,
            **base.DECODER,
        },
        "sizes": {"fast": {"data.num_train": 256}},
    }


def _variant(width, shift):
    parts = {f"{part}.weights": f"@encoder_{width}" for part in ("encoder", "decoder", "statistics")}
    return {**_encoder(width), **parts, "dit.time_shift": shift}


def get_config():
    return {
        "title": "Noise schedule shifted by the dimension of the latent",
        "claim": "Times shifted by sqrt(dimension / 4096), in training and sampling, give better images; the gain "
        "grows with the dimension of the latent.",
        "paper": [
            ("DiT-XL on RAE (dimension 196,608, factor 6.93), gFID at 80 epochs, without the shift", "23.08"),
            ("with the shift", "4.81"),
        ],
        "foundations": {f"encoder_{width}": _foundation(width) for width in _DIMENSIONS},
        "config": {
            "stages": ("dit",),
            "dit.head_width": 256,
            "dit.head_depth": 1,
            "dit.train.num_steps": 300,
            "dit.train.time_mean": 0.0,
            "dit.train.time_std": 1.0,
        },
        "variants": {
            "1024, no shift": _variant(16, 1.0),
            "1024, shifted by 0.5": _variant(16, 0.0),
            "4096, where the shift is 1": _variant(64, 0.0),
            "16384, no shift": _variant(256, 1.0),
            "16384, shifted by 2": _variant(256, 0.0),
        },
        "sizes": {"fast": {}},
        "measure": ("generation",),
        "compare": [
            {
                "says": "at dimension 16,384 the shift by 2 lowers fd",
                "metric": "fd",
                "lower": ["16384, shifted by 2"],
                "higher": ["16384, no shift"],
            },
            {
                "says": "at dimension 1,024 the shift by 0.5 lowers fd",
                "metric": "fd",
                "lower": ["1024, shifted by 0.5"],
                "higher": ["1024, no shift"],
            },
        ],
        "columns": ["fd", "agreement"],
        "plots": [{"y": "fd"}, {"y": "agreement"}],
        "note": "One encoder and decoder for each dimension (tokens of 16, 64, 256 on an 8x8 grid), by one recipe. "
        "Compare within a dimension only. Times before the shift: logit-normal(0, 1), as in the paper. At 4,096 the "
        "factor is 1, and both schedules are the same.",
    }
