"""Compare the same DiT on the latents of the RAE and of a small KL autoencoder trained on the same images.

    python -m launch.study --only=vae

base.py explains the keys.
"""

from configs.study import base

_VAE = {
    "encoder.family": "sd_vae",
    "encoder.widths": (32, 64, 64),
    "encoder.width": 4,
    "encoder.depth": 1,
    "encoder.num_heads": 1,
    "encoder.mean": (0.5, 0.5, 0.5),
    "encoder.std": (0.5, 0.5, 0.5),
    "encoder.weights": "@vae",
    "decoder.weights": "@vae",
}


def _compare(rae, vae):
    """Return the comparisons of the experiment."""
    return [
        {
            "says": "DiT^DH has a lower fd on RAE than on VAE latents",
            "metric": "fd",
            "lower": [f"{rae}, DiT^DH"],
            "higher": [f"{vae}, DiT^DH"],
        },
        {
            "says": "a plain DiT has a lower fd on RAE than on VAE latents",
            "metric": "fd",
            "lower": [f"{rae}, plain"],
            "higher": [f"{vae}, plain"],
        },
        {
            "says": "the linear probe reads more from RAE's latents, pooled",
            "metric": "probe_pooled",
            "lower": [f"{vae}, DiT^DH"],
            "higher": [f"{rae}, DiT^DH"],
        },
        {
            "says": "and from the whole latents",
            "metric": "probe_whole",
            "lower": [f"{vae}, DiT^DH"],
            "higher": [f"{rae}, DiT^DH"],
        },
    ]


def get_config():
    rae, vae = "RAE, 8x8x64", "VAE, 8x8x4"
    return {
        "title": "RAE against VAE",
        "claim": "A DiT that is wide enough converges faster on a representation encoder's latents than on a VAE's; a "
        "linear probe reads the class of an image from them.",
        "paper": [
            ("DiT-XL on SD-VAE at 80 epochs, gFID", "7.13"),
            ("DiT-XL on RAE (shifted, noise-augmented decoder)", "4.28"),
            ("DiT^DH-XL on RAE", "2.16"),
            ("DiT^DH-XL on SD-VAE", "11.70"),
            ("linear probe, DINOv2-B", "84.5 %"),
            ("linear probe, SD-VAE", "8.0 %"),
        ],
        "foundations": {
            "vae": {
                "kind": "vae",
                "config": {**_VAE, "encoder.weights": "", "decoder.weights": ""},
                "vae": {"num_steps": 1_500, "batch_size": 16, "learning_rate": 1e-3, "kl_weight": 1e-4},
                "vae_sizes": {"fast": {"num_steps": 4, "batch_size": 4}, "large": {"num_steps": 20_000}},
            },
            "vae_statistics": {
                "config": {**_VAE, "stages": ("statistics",), "data.num_train": 2_000},
                "sizes": {"fast": {"data.num_train": 256}},
            },
        },
        "config": {
            "stages": ("dit",),
            "dit.train.num_steps": 450,
            **base.kept_every(150),
        },
        "variants": {
            f"{rae}, DiT^DH": {},
            f"{rae}, plain": {"dit.head_depth": 0, "dit.width": 104},
            f"{vae}, DiT^DH": {**_VAE, "statistics.weights": "@vae_statistics", "dit.time_shift": 1.0},
            f"{vae}, plain": {
                **{**_VAE, "statistics.weights": "@vae_statistics", "dit.time_shift": 1.0},
                **{"dit.head_depth": 0, "dit.width": 104},
            },
        },
        "sizes": {"fast": base.kept_every(2), "large": base.kept_every(10_000)},
        "measure": ("reconstruction", "probe", "flops", "generation"),
        "compare": _compare(rae, vae),
        "columns": ["fd", "agreement", "psnr", "rfd", "probe_pooled", "probe_whole", "forward_gflops"],
        "plots": [
            {"y": "fd", "x": "step", "by_step": True},
            {"y": "fd", "x": "training_gflops", "by_step": True},
            {"y": "probe_whole", "bars": [f"{rae}, DiT^DH", f"{vae}, DiT^DH"]},
        ],
        "note": "The encoder of the RAE was trained on these images with labels, which the VAE does not see; its "
        "latents have 16 times as many numbers. The VAE's times are not shifted, as in the paper.",
    }
