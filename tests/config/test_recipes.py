"""The full-size configs are the papers' recipes, sizes and files."""

import importlib
from pathlib import Path

import jax
import pytest
from flax import traverse_util

from configs import dit_xl, mf_rae_xl, small
from rae_jax.build import models, objectives, part_weights
from rae_jax.config import checks
from rae_jax.config import keys as config_keys
from rae_jax.models.dit import DiT
from rae_jax.runtime import sharding

# Width, layers, heads and MLP of the decoders, and their GFLOPs at 256 px; width, depth and heads of the DiTs
# (../shared/REFERENCE.md, sections 3 and 5).
DECODERS = {"b": (768, 12, 12, 3072, 22.2), "l": (1024, 24, 16, 4096, 78.1), "xl": (1152, 28, 16, 4096, 106.7)}
DITS = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
FULL_SIZE = {
    **{f"decoder_{size}": (size, "b") for size in ("b", "l", "xl")},
    **{f"dit_{size}": ("xl", size) for size in DITS},
    **{name: ("xl", "xl") for name in ("dit_xl_512", "plain_dit_xl", "sdvae_dit_xl")},
}


def test_every_full_size_config_is_compared_with_the_paper():
    there = {path.stem for path in Path(small.__file__).parent.glob("*.py")}
    others = {"encoders", "diffusion", "small", "quickstart", "own_data", *OTHER_ENCODERS}
    raev2 = {"raev2_xl", "raev2_decoder_k7", "raev2_decoder_k23"}  # test_raev2_recipes.py
    assert there == {*others, *raev2, *FULL_SIZE, "mf_rae_xl"}


def test_the_student_s_recipe_is_mf_rae_s():
    """It is dit_xl with one stage more (../shared/FOLLOWUPS.md, section 2); the number of its epochs is not known."""
    config, base = mf_rae_xl.get_config(), dit_xl.get_config()
    few, train = config.few_step, config.few_step.train
    wanted = {
        "batch_size": 256,
        "learning_rate": 1e-4,
        "final_learning_rate": 1e-4,
        "warmup_steps": 0,
        "clip_norm": 1.0,
    }
    wanted |= {"optimizer": "adamw", "b1": 0.9, "b2": 0.95, "weight_decay": 0.0, "ema_decay": 0.9999}
    wanted |= {"label_dropout": 0.1}
    assert {key: train[key] for key in wanted} == wanted
    assert (few.objective, few.derivative, few.difference) == ("distillation", "differences", 5e-3)
    assert (few.equal_times, few.balance) == (0.75, 1.0)
    assert not few.guided and few.trajectories.to_dict() == {"points": 16, "pairs": 8} and config.dtype == "float32"
    flat, plain = (config_keys.flatten(c.to_dict()) for c in (config, base))
    differing = {key for key in flat if flat[key] != plain[key] and not key.startswith("few_step.")}
    assert differing == {"name", "stages", "checkpoint.every", "sampler.method", "sampler.grid", "sampler.num_steps"}
    assert config.sampler.method == "mean_velocity" and config.sampler.num_steps == 1 and config.dit.weights
    shapes = part_weights.shapes(config, "few_step")
    assert part_weights.shapes(base, "dit").keys() ^ shapes.keys() == {"interval_embed"}


OTHER_ENCODERS = {"decoder_xl_dinov2_s": ("small", 384), "decoder_xl_dinov2_l": ("large", 1024)}


@pytest.mark.parametrize("name", OTHER_ENCODERS)
def test_the_released_decoders_of_other_encoders(name):
    """They differ from decoder_xl in the encoder and in the files (../shared/FOLLOWUPS.md, section 5)."""
    size, width = OTHER_ENCODERS[name]
    config, base = (importlib.import_module(f"configs.{n}").get_config() for n in (name, "decoder_xl"))
    flat, plain = (config_keys.flatten(c.to_dict()) for c in (config, base))
    differing = {key for key in flat if flat[key] != plain[key]}
    sizes = {"encoder.width", "encoder.num_heads", *(["encoder.depth"] if size == "large" else [])}
    assert differing == {"name", "encoder.weights", "decoder.weights", "statistics.weights", *sizes}
    assert config.encoder.weights == f"facebook/dinov2-with-registers-{size}" and config.encoder.width == width
    files = "nyu-visionx/RAE-collections"
    assert config.decoder.weights == f"{files}:decoders/dinov2/wReg_{size}/ViTXL_n08/model.pt"
    assert config.statistics.weights == f"{files}:stats/dinov2/wReg_{size}/imagenet1k/stat.pt"


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_recipes_are_the_papers(name):
    """Stage 1 on ImageNet, and stage 2; epochs are the unit of both (../shared/REFERENCE.md, sections 4 and 6)."""
    both = {
        "unit": "epoch",
        "learning_rate": 2e-4,
        "final_learning_rate": 2e-5,
        "b1": 0.9,
        "b2": 0.95,
        "weight_decay": 0.0,
    }
    decoder = {"num_steps": 16, "warmup_steps": 1, "discriminator_start": 6, "adversarial_start": 8, "batch_size": 512}
    decoder |= {"decay": "cosine", "decay_start": 0, "clip_norm": 0.0, "ema_decay": 0.9978, "noise_tau": 0.8}
    decoder |= {"lpips_weight": 1.0, "adversarial_weight": 0.75, "crop": "random", "flip": False, "optimizer": "adamw"}
    dit = {"num_steps": 800, "warmup_steps": 0, "decay_start": 40, "decay": "linear", "batch_size": 1024}
    dit |= {"clip_norm": 1.0, "ema_decay": 0.9995, "crop": "centre", "flip": True, "optimizer": "adamw"}
    dit |= {"time": "logit_normal", "time_mean": 0.0, "time_std": 1.0, "label_dropout": 0.1}
    config = importlib.import_module(f"configs.{name}").get_config()
    for part, recipe in (("decoder", decoder), ("dit", dit)):
        wanted = both | recipe
        assert {key: config[part].train[key] for key in wanted} == wanted
    assert config.dit.path == "linear" and config.dit.prediction == "velocity" and config.dit.time_shift == 0.0
    assert config.sampler.grid == "published" and config.sampler.num_steps == 50 and config.sampler.method == "euler"
    assert config.guidance.method == "none" and config.dit.class_conditional and config.dit.average == 0
    discriminator = config.discriminator
    assert discriminator.layers == (11, 2, 5, 8, 11) and discriminator.loss == "hinge"
    assert discriminator.augment.to_dict() == {"prob": 1.0, "cutout": 0.0}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_models_are_the_papers(name):
    """In their sizes, as they are built, and in what goes in and comes out; the same 50,000 images judge them all."""
    config = importlib.import_module(f"configs.{name}").get_config()
    decoder_size, dit_size = FULL_SIZE[name]
    e = config.encoder
    assert (config.evaluate.num_images, config.data.num_classes, config.dtype) == (50_000, 1000, "float32")
    assert config.data.image_size == (512 if name == "dit_xl_512" else 256)
    dit = models.dit(config)
    assert (dit.width, dit.depth, dit.num_heads) == DITS[dit_size]
    assert (dit.embed(8).num_classes, dit.patch_size, dit.qk_norm) == (1000, 2 if name == "sdvae_dit_xl" else 1, False)
    if name in ("plain_dit_xl", "sdvae_dit_xl"):
        assert isinstance(dit, DiT)
    else:
        assert (dit.head_width, dit.head_depth, dit.head_num_heads) == (2048, 2, 16)
    if name == "sdvae_dit_xl":
        assert (e.weights.split(":")[0], config_keys.latent_shape(config)) == ("stabilityai/sd-vae-ft-ema", (32, 32, 4))
        assert (e.widths, e.depth) == ((128, 256, 512, 512), 2)
        assert config.decoder.weights == e.weights and config.statistics.weights == "none"
        return
    assert e.weights == "facebook/dinov2-with-registers-base"
    assert (e.input_size, e.layers) == (448 if name == "dit_xl_512" else 224, ())
    decoder = models.autoencoder(config).decoder
    *sizes, giga_products = DECODERS[decoder_size]
    assert [decoder.width, decoder.depth, decoder.num_heads, decoder.hidden] == sizes
    assert (decoder.patch_size, decoder.grid_size) == (16, None)
    if name.startswith("decoder"):  # the products with kernels for 256 tokens and the class token
        shapes = traverse_util.flatten_dict(part_weights.shapes(config, "decoder"))
        products = 257 * sum(leaf.size for path, leaf in shapes.items() if path[-1] == "kernel")
        assert products / 1e9 == pytest.approx(giga_products, rel=5e-3)


_IMAGENET256 = "DiTs/Dinov2/wReg_base/ImageNet256"


RELEASED = {  # of DiTs
    "dit_xl": f"{_IMAGENET256}/DiTDH-XL/stage2_model.pt",
    "dit_s": f"{_IMAGENET256}/DiTDH-S_ep14/stage2_model.pt",
}


@pytest.mark.parametrize("name", [name for name in FULL_SIZE if name not in ("dit_xl_512", "sdvae_dit_xl")])
def test_the_released_files_are_named(name):
    """The files of ../shared/REFERENCE.md, section 8; no file for parts of other sizes, which nobody has released."""
    config = importlib.import_module(f"configs.{name}").get_config()
    files = {
        "decoder": "decoders/dinov2/wReg_base/ViTXL_n08/model.pt" if FULL_SIZE[name][0] == "xl" else "",
        "statistics": "stats/dinov2/wReg_base/imagenet1k/stat.pt",
        "dit": RELEASED.get(name, ""),
        "backbone": "discs/dino_vit_small_patch8_224.pth",
    }
    expected = {part: file and f"nyu-visionx/RAE-collections:{file}" for part, file in files.items()}
    assert {part: config_keys.section(config, part).weights for part in files} == expected


CONFIGS = sorted(
    path.stem for path in Path(small.__file__).parent.glob("*.py") if path.stem not in ("encoders", "diffusion")
)


def test_the_configs_are_right():
    """Every one passes the checks, every key is one that the small config has, and every part has a shape."""
    keys = set(config_keys.flatten(small.get_config().to_dict()))
    for name in CONFIGS:
        config = importlib.import_module(f"configs.{name}").get_config()
        assert config.name == name and set(config_keys.flatten(config.to_dict())) == keys
        checks.check(config, sharding.make_mesh(config.mesh))
        trained = config.stages if config.stages != small.get_config().stages else ()
        for part in {*trained, "encoder", "decoder", "statistics", "dit"}:
            placed = sharding.shardings(part_weights.shapes(config, part), sharding.make_mesh(config.mesh))
            assert jax.tree.leaves(placed), (name, part)


def test_full_size_latents_and_images_fit():
    latents = {"dit_b": (16, 16, 768), "dit_xl_512": (32, 32, 768)}
    for name, latent in latents.items():
        config = importlib.import_module(f"configs.{name}").get_config()
        assert config_keys.latent_shape(config) == latent
        autoencoder = models.autoencoder(config)
        side = config.data.image_size
        image = jax.ShapeDtypeStruct((2, side, side, 3), "float32")
        encoded = jax.eval_shape(autoencoder.encode, part_weights.shapes(config, "encoder"), image)
        assert jax.eval_shape(autoencoder.decode, part_weights.shapes(config, "decoder"), encoded).shape == image.shape


def test_the_full_size_discriminator_is_the_published_one():
    config = importlib.import_module("configs.decoder_xl").get_config()
    discriminator = objectives.decoder_objective(config).discriminator
    shapes = part_weights.shapes(config, "backbone")
    image = jax.ShapeDtypeStruct((2, 256, 256, 3), "float32")
    assert jax.eval_shape(discriminator.backbone, shapes, image).shape == (5, 2, 28 * 28, 384)
    disc = jax.eval_shape(discriminator.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(disc["params"])) == 5 * (384 * 384 * 10 + 384 * (2 + 4 + 1) + 1)
