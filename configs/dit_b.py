"""DiT^DH-B on DINOv2-B with registers, ImageNet at 256 px: the paper's recipe, and the base of the full-size configs.

    python -m rae_jax.main --config=configs/dit_b.py --workdir=runs/dit_b --config.data.path=IMAGENET/train \
        --config.data.heldout_path=IMAGENET/val

It trains only the DiT^DH, with the released decoder and statistics: 800 epochs at batch 1024. The paper reports gFID
3.38 after 80 epochs, without guidance, against ADM's images
(--config.evaluate.reference=VIRTUAL_imagenet256_labeled.npz).
"""

from configs import encoders, small

RELEASED = "nyu-visionx/RAE-collections"
LPIPS = {"vgg": "timm/vgg16.tv_in1k", "linear": "chaofengc/IQA-PyTorch-Weights:LPIPS_v0.1_vgg-a78928a0.pth"}
INCEPTION = "RaphaelLiu/EvalCrafter-Models:pt_inception-2015-12-05-6726825d.pth"  # a copy of pytorch-fid's file
IMAGENET = 1_281_167  # training images


def get_config():
    """Return the whole recipe; the other full-size configs change its sizes and stages."""
    c = small.get_config()
    c.name = "dit_b"
    c.stages = ("dit",)
    c.log_every = 100
    c.attention = c.remat = c.unroll = "auto"
    c.mesh.fsdp = -1  # at most 16 devices; the others are on the axis data
    c.checkpoint.every = 10 * epoch(1024)
    c.data.update({"source": "image_folder", "image_size": 256, "num_classes": 1000, "num_threads": 16})
    c.encoder.update(encoders.dinov2("base"))
    c.decoder.update({"weights": f"{RELEASED}:decoders/dinov2/wReg_base/ViTXL_n08/model.pt", **DECODERS["xl"]})
    c.decoder.patch_size = 16
    c.discriminator.update({"backbone": encoders.dino(), "layers": (11, 2, 5, 8, 11)})
    c.statistics.weights = f"{RELEASED}:stats/dinov2/wReg_base/imagenet1k/stat.pt"
    c.dit.update({"weights": "", **DITS["b"], "head_width": 2048, "head_depth": 2, "head_num_heads": 16})
    c.judge.weights = ""  # no judge of 1000 classes exists
    _decoder_recipe(c.decoder.train)
    _dit_recipe(c.dit.train)
    c.sampler.update({"grid": "published", "num_steps": 50})
    c.guidance.update({"method": "none", "scale": 1.0})
    c.lpips.update(LPIPS)
    c.evaluate.update({"num_images": 50_000, "probe": False, "inception": INCEPTION})
    return c


DECODERS = {
    "b": {"width": 768, "depth": 12, "num_heads": 12, "hidden": 3072},
    "l": {"width": 1024, "depth": 24, "num_heads": 16, "hidden": 4096},
    "xl": {"width": 1152, "depth": 28, "num_heads": 16, "hidden": 4096},
}
DITS = {
    "s": {"width": 384, "depth": 12, "num_heads": 6},
    "b": {"width": 768, "depth": 12, "num_heads": 12},
    "l": {"width": 1024, "depth": 24, "num_heads": 16},
    "xl": {"width": 1152, "depth": 28, "num_heads": 16},
}


def epoch(batch_size):
    """Return the number of steps of one epoch of ImageNet."""
    return IMAGENET // batch_size


def _decoder_recipe(train):
    train.update(
        {"unit": "epoch", "num_steps": 16, "warmup_steps": 1, "discriminator_start": 6, "adversarial_start": 8}
    )
    train.update({"batch_size": 512, "learning_rate": 2e-4, "final_learning_rate": 2e-5, "decay": "cosine"})
    train.update({"lpips_weight": 1.0, "adversarial_weight": 0.75, "noise_tau": 0.8, "ema_decay": 0.9978})
    train.crop = "random"


def _dit_recipe(train):
    train.update({"unit": "epoch", "num_steps": 800, "warmup_steps": 0, "decay_start": 40, "decay": "linear"})
    train.update({"batch_size": 1024, "learning_rate": 2e-4, "final_learning_rate": 2e-5, "clip_norm": 1.0})
    train.update({"optimizer": "adamw", "ema_decay": 0.9995, "time_mean": 0.0, "time_std": 1.0, "label_dropout": 0.1})
    train.flip = True
