"""Config of a run of two stages that starts in seconds and steps in milliseconds, for soak.py, faults.py and fuzz.py.

The weights of its encoder and statistics are random; harness.py writes them.
"""

from configs import small


def get_config():
    """Return configs/small.py with every size reduced."""
    c = small.get_config()
    c.name, c.unroll, c.log_every, c.stages = "tiny", False, 1, ("decoder", "dit")
    c.checkpoint.update({"every": 2, "keep": 2})
    c.data.update({"num_train": 96, "num_heldout": 16, "num_threads": 1})
    c.encoder.update({"width": 16, "depth": 1, "num_heads": 1})
    c.judge.weights = ""
    c.decoder.update({"width": 16, "depth": 1, "num_heads": 1, "hidden": 16})
    c.discriminator.layers = (0,)
    c.dit.update({"width": 16, "depth": 1, "num_heads": 1, "head_width": 16, "head_depth": 1, "head_num_heads": 1})
    c.judge.widths = (8,)
    for stage in (c.encoder, c.judge, c.decoder, c.dit):
        stage.train.update({"num_steps": 100, "batch_size": 8, "warmup_steps": 2, "optimizer": "adamw"})
    c.decoder.train.update({"discriminator_start": 5, "adversarial_start": 10})
    c.sampler.num_steps = 2
    c.evaluate.update({"num_images": 8, "batch_size": 8, "probe": False})
    return c
