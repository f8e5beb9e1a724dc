"""Compare decoders trained with different noise on their latents, in reconstruction and in generation.

    python -m launch.study --only=noise

base.py explains the keys.
"""

from configs.study import base

_TAUS = (0.0, 0.2, 0.4, 0.8)


def get_config():
    names = [f"tau {tau}" for tau in _TAUS]
    return {
        "title": "Noise-augmented decoding",
        "claim": "A decoder trained on noisy latents reconstructs slightly worse and decodes generated latents better.",
        "paper": [
            ("gFID of DiT-XL at 80 epochs, decoder with tau = 0", "4.81"),
            ("tau = 0.8", "4.28"),
            ("rFID, tau = 0", "0.49"),
            ("tau = 0.8", "0.57"),
        ],
        "config": {"stages": ("decoder",), **base.DECODER, **base.MAIN_DIT},
        "variants": {name: {"decoder.train.noise_tau": tau} for name, tau in zip(names, _TAUS, strict=True)},
        "sizes": {"fast": {"dit.weights": "@weak"}},
        "measure": ("reconstruction", "generation"),
        "generators": {"": {}, "weak": {"dit.weights": "@weak"}},
        "compare": [
            {"says": "tau = 0.8 lowers psnr against 0", "metric": "psnr", "lower": ["tau 0.8"], "higher": ["tau 0.0"]},
            {"says": "tau = 0.8 raises rfd against 0", "metric": "rfd", "lower": ["tau 0.0"], "higher": ["tau 0.8"]},
            {
                "says": "tau = 0.8 lowers fd of the main DiT's latents against 0",
                "metric": "fd",
                "lower": ["tau 0.8"],
                "higher": ["tau 0.0"],
            },
            {
                "says": "tau = 0.8 lowers fd of a barely trained DiT's latents against 0",
                "metric": "weak_fd",
                "lower": ["tau 0.8"],
                "higher": ["tau 0.0"],
            },
            {
                "says": "tau = 0.4 lowers fd of a barely trained DiT's latents against 0",
                "metric": "weak_fd",
                "lower": ["tau 0.4"],
                "higher": ["tau 0.0"],
            },
        ],
        "columns": ["psnr", "rfd", "fd", "weak_fd", "agreement", "weak_agreement"],
        "plots": [
            {"y": "psnr", "x": "decoder.train.noise_tau", "series": {"reconstruction": names}},
            {"y": "rfd", "x": "decoder.train.noise_tau", "series": {"reconstruction": names}},
            {"y": "fd", "x": "decoder.train.noise_tau", "series": {"main DiT": names}},
            {"y": "weak_fd", "x": "decoder.train.noise_tau", "series": {"weak DiT": names}},
        ],
        "note": "One encoder; all decoders of a seed get the same generated latents. rfd: reconstructions; fd: latents "
        "of the main DiT; weak_fd: latents of a DiT after 300 steps. The encoder itself was trained with noise of "
        "tau = 0.3 on its latents, which makes slightly wrong latents easy to decode.",
    }
