"""Compare the reuse of the trunk's output in several Euler steps with fewer steps.

    python -m launch.study --only=reuse

base.py explains the keys.
"""

from configs.study import base


def get_config():
    steps, reuse = (50, 25, 10), (2, 5)
    plain = [f"{n} steps" for n in steps]
    shared = [f"50 steps, trunk every {n}" for n in reuse]
    return {
        "title": "Reuse of the trunk's output",
        "claim": "The trunk's output changes slowly from noise to data: its reuse in several steps saves time at "
        "little loss of quality.",
        "paper": [("not in the paper: DDT (2504.05741) shares its encoder's output between steps", "")],
        "config": {**base.MAIN_DIT, "sampler.num_steps": 50},
        "variants": {
            **{name: {"sampler.num_steps": n} for name, n in zip(plain, steps, strict=True)},
            **{name: {"sampler.reuse": n} for name, n in zip(shared, reuse, strict=True)},
        },
        "sizes": {"fast": {"dit.weights": "@weak", "sampler.num_steps": 50}},
        "measure": ("generation", "flops", "speed"),
        "compare": [
            {
                "says": "the trunk every second step of 50 takes less time than 50 steps",
                "metric": "seconds_per_image",
                "lower": ["50 steps, trunk every 2"],
                "higher": ["50 steps"],
            },
            {
                "says": "the trunk every fifth step of 50 has a lower fd than 25 plain steps, which take fewer FLOPs",
                "metric": "fd",
                "lower": ["50 steps, trunk every 5"],
                "higher": ["25 steps"],
            },
        ],
        "columns": ["fd", "agreement", "sampling_gflops", "seconds_per_image"],
        "plots": [
            {"y": "fd", "x": x, "series": {"fewer steps": plain, "50 steps, trunk reused": ["50 steps", *shared]}}
            for x in ("sampling_gflops", "seconds_per_image")
        ],
        "note": "Samples of the main DiT without guidance. Each seed has other noise. seconds_per_image: one core.",
    }
