"""MF-RAE's student of the released DiT^DH-XL, ImageNet at 256 px: samples in one step.

    python -m rae_jax.main --config=configs/mf_rae_xl.py --workdir=runs/mf_rae --config.data.path=IMAGENET/train \
        --config.data.heldout_path=IMAGENET/val

The paper (arXiv 2511.13019) reports gFID 2.03 with one step and 1.89 with two. There, a training on trajectories comes
first: the same command with another workdir and

    --config.few_step.objective=trajectories --config.few_step.train.batch_size=8 \
        --config.few_step.train.ema_decay=0.999

(8 trajectories need at most 8 devices: more devices need a larger batch). The distillation starts from that run with
--config.few_step.train.init=WORKDIR. How long the authors trained is not known here: 40 epochs are a guess.
--mode=sample with --config.stages="()" and --config.few_step.weights=FILE samples the published student, whose weights
are not on the hub.
"""

from configs import dit_xl


def get_config():
    """dit_xl as the teacher, and MF-RAE's distillation."""
    c = dit_xl.get_config()
    c.name = "mf_rae_xl"
    c.stages = ("few_step",)
    c.few_step.update({"guided": False, "equal_times": 0.75, "balance": 1.0})
    train = c.few_step.train
    train.update({"unit": "epoch", "num_steps": 40, "warmup_steps": 0, "flip": True})
    train.update({"batch_size": 256, "learning_rate": 1e-4, "final_learning_rate": 1e-4, "clip_norm": 1.0})
    train.update({"optimizer": "adamw", "ema_decay": 0.9999, "label_dropout": 0.1})
    c.checkpoint.every = dit_xl.dit_b.epoch(256)
    c.sampler.update({"method": "mean_velocity", "grid": "plain", "num_steps": 1})
    return c
