"""Discriminator, its losses and augmentation."""

import encoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny
from huggingface_hub import constants
from safetensors.numpy import load_file

from configs import encoders
from rae_jax.build import models, part_weights, stages
from rae_jax.config import checks
from rae_jax.errors import UserError
from rae_jax.models.discriminator import DiscriminatorHeads, SpectralConv, TokenNorm
from rae_jax.runtime import sharding
from rae_jax.training import adversarial


def test_spectral_convolution_divides_by_the_largest_singular_value():
    conv = SpectralConv(features=6, kernel=9)
    x = jax.random.normal(jax.random.key(0), (2, 16, 4))
    variables = conv.init(jax.random.key(1), x)
    for _ in range(200):
        y, moved = conv.apply(variables, x, mutable=["spectral"])
        variables = {**variables, **moved}
    kernel = np.asarray(variables["params"]["kernel"])
    sigma = np.linalg.svd(kernel.reshape(-1, 6), compute_uv=False)[0]
    padded = np.pad(np.asarray(x), ((0, 0), (4, 4), (0, 0)), mode="wrap")
    windows = np.stack([padded[:, i : i + 16] for i in range(9)], 2)  # [B, N, 9, C]
    expected = np.einsum("bnkc,kcf->bnf", windows, kernel / sigma) + np.asarray(variables["params"]["bias"])
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_tokens_are_normed_by_channel_and_image_with_an_epsilon_of_a_millionth():
    """Seen where the variance is as small."""
    rng = np.random.default_rng(0)
    x, (scale, bias) = 0.3 + 1e-3 * rng.normal(size=(2, 16, 4)), rng.normal(size=(2, 4))
    found = TokenNorm().apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x, jnp.float32))
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6) * scale + bias
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_evaluation_leaves_the_singular_vectors_alone():
    heads = DiscriminatorHeads()
    tokens = jax.random.normal(jax.random.key(0), (2, 3, 16, 8))
    variables = heads.init(jax.random.key(1), tokens)
    still, _ = heads.apply(variables, tokens, mutable=())
    logits, moved = heads.apply(variables, tokens, mutable=["spectral"])
    assert logits.shape == (3, 2 * 16)
    np.testing.assert_array_equal(still, heads.apply(variables, tokens))
    for head in ("head0", "head1"):
        for conv in ("in_conv", "mix_conv"):  # the last one has rank one: it is there after one iteration
            before, after = (v["spectral"][head][conv]["u"] for v in (variables, moved))
            assert float(jnp.abs(before - after).max()) > 1e-3


def _torch_head(width, params, spectral):
    """A head by its definition, of torch's own layers, with our parameters and singular vectors."""
    import torch
    from torch import nn
    from torch.nn.utils.spectral_norm import SpectralNorm

    def conv(name, features, kernel):
        layer = nn.Conv1d(width, features, kernel, padding=kernel // 2, padding_mode="circular")
        SpectralNorm.apply(layer, name="weight", n_power_iterations=1, dim=0, eps=1e-12)
        kernel = np.asarray(params[name]["kernel"])  # [kernel, in, out]
        layer.weight_orig.data = torch.from_numpy(kernel.transpose(2, 1, 0).copy())
        layer.bias.data = torch.from_numpy(np.asarray(params[name]["bias"]).copy())
        layer.weight_u.data = torch.from_numpy(np.asarray(spectral[name]["u"]).copy())
        v = np.asarray(spectral[name]["v"]).reshape(kernel.shape[:2])  # ours is [kernel, in], theirs [in, kernel]
        layer.weight_v.data = torch.from_numpy(v.T.copy().ravel())
        return layer

    def norm(name, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        scale, bias = (torch.from_numpy(np.asarray(params[name][k]).copy())[:, None] for k in ("scale", "bias"))
        return (x - mean) / (var + 1e-6).sqrt() * scale + bias

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_conv, self.mix_conv = conv("in_conv", width, 1), conv("mix_conv", width, 9)
            self.out = conv("out", 1, 1)

        def forward(self, x):  # [B, C, N]
            x = nn.functional.leaky_relu(norm("in_norm", self.in_conv(x)), 0.2)
            x = (x + nn.functional.leaky_relu(norm("mix_norm", self.mix_conv(x)), 0.2)) / 2**0.5
            return self.out(x)[:, 0]

    return Head()


@pytest.mark.parametrize("training", [False, True])
def test_heads_are_torch_s(training):
    """Logits, singular vectors after two passes, and gradients in the images' and the weights' direction."""
    torch = pytest.importorskip("torch")
    tokens = 0.5 + jax.random.normal(jax.random.key(0), (2, 3, 25, 8))
    heads = DiscriminatorHeads()
    variables = heads.init(jax.random.key(1), tokens)
    noise = iter(jax.random.split(jax.random.key(2), 100))
    variables["params"] = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(noise), p.shape), variables["params"])
    theirs = [
        _torch_head(8, *(variables[c][f"head{i}"] for c in ("params", "spectral"))).train(training) for i in range(2)
    ]
    x = torch.from_numpy(np.asarray(tokens).transpose(0, 1, 3, 2).copy()).requires_grad_()

    @jax.jit
    def ours(params, spectral, tokens):
        def loss(params, tokens):
            variables = {"params": params, "spectral": spectral}
            logits, moved = heads.apply(variables, tokens, mutable=["spectral"] if training else ())
            return jnp.square(logits).sum(), (logits, moved)

        (_, aux), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, tokens)
        return *aux, *grads

    spectral = variables["spectral"]
    for _ in range(2):
        x.grad = None
        logits, moved, grads, at_tokens = ours(variables["params"], spectral, tokens)
        spectral = moved["spectral"] if training else spectral
        expected = torch.cat([head(x[i]) for i, head in enumerate(theirs)], 1)
        for head in theirs:
            head.zero_grad()
        expected.square().sum().backward()
        np.testing.assert_allclose(logits, expected.detach(), atol=1e-4)
        np.testing.assert_allclose(at_tokens.transpose(0, 1, 3, 2), x.grad, atol=1e-4)
        for i, head in enumerate(theirs):
            for name in ("in_conv", "mix_conv", "out"):
                layer, found = getattr(head, name), grads[f"head{i}"][name]
                scale = max(float(layer.weight_orig.grad.abs().max()), 1.0)
                np.testing.assert_allclose(
                    found["kernel"].transpose(2, 1, 0), layer.weight_orig.grad, atol=1e-4 * scale
                )
                np.testing.assert_allclose(found["bias"], layer.bias.grad, atol=1e-4 * scale)
                np.testing.assert_allclose(spectral[f"head{i}"][name]["u"], layer.weight_u, atol=1e-5)


def test_a_backbone_of_its_own_sees_resized_images_and_gives_patch_tokens_of_its_blocks(tmp_path):
    """DINO as transformers has it, on images that torch resizes; the published file's bias of the keys is left out."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config = tiny()
    config.discriminator.update({"backbone": encoders.dino(), "layers": (1, 0, 1)})
    config.discriminator.backbone.update(
        {"weights": str(tmp_path), "width": 16, "depth": 2, "num_heads": 2, "input_size": 24, "position_size": 24}
    )
    checks.check(config, sharding.make_mesh(config.mesh))
    case = encoder_cases.TINY["dino"]
    theirs = transformers.ViTModel(transformers.ViTConfig(**{**case.theirs, "patch_size": 8}), add_pooling_layer=False)
    theirs.save_pretrained(tmp_path)
    shapes = {name: array.shape for name, array in load_file(tmp_path / "model.safetensors").items()}
    encoder_cases.write(tmp_path, shapes)
    theirs = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()

    params = part_weights.load(config, "backbone", "", sharding.make_mesh(config.mesh))
    assert not np.asarray(params["blocks"]["attention"]["qkv"]["bias"])[:, 16:32].any()
    images = encoder_cases.images(32, 32, batch=3) * 1.4 - 0.2  # as augmentation leaves them, not clipped
    ours = jax.jit(models.backbone(config))(params, images)
    small = torch.nn.functional.interpolate(
        torch.from_numpy(images).permute(0, 3, 1, 2), size=(24, 24), mode="bilinear", align_corners=False
    )
    mean, std = (torch.tensor(encoders.dino()[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        hidden = theirs((small - mean) / std, output_hidden_states=True).hidden_states
    expected = np.stack([hidden[layer + 1][:, 1:].numpy() for layer in (1, 0, 1)])
    assert ours.shape == (3, 3, 9, 16)
    np.testing.assert_allclose(ours, expected, atol=5e-5)


def test_missing_backbone_weights_say_what_to_do(tmp_path, monkeypatch):
    """The file, where it is, where to put it, the key that names it, and the one that does without."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = tiny()
    config.stages = ("decoder",)
    config.discriminator.update({"backbone": encoders.dino(), "layers": (11, 2, 5, 8, 11)})
    mesh = sharding.make_mesh(config.mesh)
    config.encoder.update({"width": 64, "depth": 6})  # the shipped one
    with pytest.raises(UserError) as refusal:
        stages.stage(config, "decoder", tmp_path, mesh)
    said = str(refusal.value)
    for part in (
        "config.discriminator.backbone.weights",
        "discs/dino_vit_small_patch8_224.pth of nyu-visionx/RAE-collections",
        "put it in a local folder",
        "--config.decoder.train.adversarial_weight=0",
    ):
        assert part in said
    assert "\n" not in said
    config.decoder.train.adversarial_weight = 0.0
    assert set(stages.stage(config, "decoder", tmp_path, mesh).frozen) == {"encoder"}


def test_losses_of_logits():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-2.0, 0.0, 1.0])
    cross_entropy = np.log1p(np.exp([-2.0, -0.5, 1.0])).mean() + np.log1p(np.exp([-2.0, 0.0, 1.0])).mean()
    assert float(adversarial.vanilla_loss(real, fake)) == pytest.approx(0.5 * cross_entropy, rel=1e-6)
    assert float(adversarial.hinge_loss(real, fake)) == pytest.approx(0.5 * (2.5 / 3 + 3.0 / 3))
    assert float(adversarial.generator_loss(fake)) == pytest.approx(1.0 / 3)


def test_adaptive_weight_is_clipped_and_constant():
    a, b = jnp.full(4, 3.0), jnp.full(4, 1.0)
    assert float(adversarial.adaptive_weight(a, b)) == pytest.approx(3.0, rel=1e-5)
    assert float(adversarial.adaptive_weight(a, jnp.zeros(4))) == 1e4
    assert float(jax.grad(lambda a: adversarial.adaptive_weight(a, b))(a).sum()) == 0.0


def test_translation_shifts_within_an_eighth():
    x = jax.random.normal(jax.random.key(0), (64, 16, 16, 3))
    y = np.asarray(adversarial.translate(x, jax.random.key(1)))
    x = np.pad(np.asarray(x), ((0, 0), (2, 2), (2, 2), (0, 0)))
    offsets = set()
    for image, moved in zip(x, y, strict=True):
        hits = [(i, j) for i in range(5) for j in range(5) if np.array_equal(image[i : i + 16, j : j + 16], moved)]
        assert len(hits) == 1
        offsets.add(hits[0])
    assert len(offsets) > 15  # of 25


def test_augmentation_draws_for_each_image_alone():
    x = jnp.tile(jax.random.uniform(jax.random.key(0), (1, 16, 16, 3)) * 2 - 1, (4, 1, 1, 1))
    y = adversarial.diff_augment(x, jax.random.key(1))
    assert y.shape == x.shape
    assert all(float(jnp.abs(y[i] - y[j]).max()) > 1e-3 for i in range(4) for j in range(i))
    np.testing.assert_array_equal(y, adversarial.diff_augment(x, jax.random.key(1)))
    # With the second half of a batch being the fakes: the first half's draws do not depend on what is in it.
    np.testing.assert_array_equal(y[:2], adversarial.diff_augment(x.at[2:].set(0.0), jax.random.key(1))[:2])


def test_colour_keeps_grey_grey_and_means_but_for_brightness():
    x = jax.random.uniform(jax.random.key(0), (32, 8, 8, 3)) * 2 - 1
    y = adversarial.colour(x, jax.random.split(jax.random.key(1), 3))
    shift = (y - x).mean((1, 2, 3))  # saturation and contrast leave an image's mean where it is
    assert float(jnp.abs(shift).max()) <= 0.5 and float(shift.std()) > 0.2
    grey = jnp.broadcast_to(x.mean(-1, keepdims=True), x.shape)
    y = adversarial.colour(grey, jax.random.split(jax.random.key(1), 3))
    np.testing.assert_allclose(y, jnp.broadcast_to(y[..., :1], y.shape), atol=1e-6)
    contrast = np.asarray(y.std((1, 2, 3)) / grey.std((1, 2, 3)))
    assert 0.5 <= contrast.min() < 0.7 and 1.3 < contrast.max() <= 1.5


def test_colour_is_its_formula():
    x, keys = np.random.default_rng(0).uniform(-1, 1, (6, 8, 8, 3)), jax.random.split(jax.random.key(1), 3)
    brightness, saturation, contrast = (np.float64(jax.random.uniform(key, (6, 1, 1, 1))) for key in keys)
    y = x + brightness - 0.5
    grey = y.mean(-1, keepdims=True)
    y = grey + 2 * saturation * (y - grey)
    mean = y.mean((1, 2, 3), keepdims=True)
    expected = mean + (contrast + 0.5) * (y - mean)
    np.testing.assert_allclose(adversarial.colour(jnp.asarray(x, jnp.float32), keys), expected, atol=1e-5)


def test_translation_comes_before_colour():
    """So that what moves in is as bright as the rest became."""
    x = jnp.ones((64, 16, 16, 3))
    y = np.asarray(adversarial.diff_augment(x, jax.random.key(1)))
    moved = np.asarray(adversarial.translate(x, jax.random.split(jax.random.key(1), 4)[3])) == 0.0
    assert moved.any() and (np.abs(y[moved]) > 1e-3).mean() > 0.9


def test_augmentation_s_gradient_is_one_over_all_pixels_that_stay():
    """It is linear in the image but for the draws: a directional derivative is a difference."""
    x, d = (jax.random.normal(jax.random.key(i), (4, 16, 16, 3)) for i in (0, 1))
    f = lambda x: adversarial.diff_augment(x, jax.random.key(2), cutout=0.5)  # noqa: E731
    _, tangent = jax.jvp(f, (x,), (d,))
    np.testing.assert_allclose(tangent, f(x + d) - f(x), atol=1e-4)


@pytest.mark.parametrize("prob", [0.0, 0.3])
def test_probability_of_an_augmentation(prob):
    x = jax.random.uniform(jax.random.key(0), (500, 8, 8, 3)) * 2 - 1
    y = np.asarray(adversarial.diff_augment(x, jax.random.key(1), prob=prob, cutout=0.25))
    changed = (y != np.asarray(x)).any((1, 2, 3))
    wanted = 1.0 - (1.0 - prob * 8 / 9) * (1.0 - prob) ** 2  # one shift of nine is by nothing
    assert abs(changed.mean() - wanted) <= 0.07
    np.testing.assert_array_equal(y[~changed], np.asarray(x)[~changed])


def test_cutout_wipes_out_one_square():
    y = np.asarray(adversarial.cut_out(jnp.ones((200, 16, 16, 3)), jax.random.key(0), 0.25))
    wiped = (y == 0).all(-1)
    assert set(np.unique(y)) == {0.0, 1.0} and wiped.any((1, 2)).all()
    for image in wiped:
        rows, columns = image.any(1), image.any(0)
        np.testing.assert_array_equal(image, rows[:, None] & columns)
        assert all(2 <= side.sum() <= 4 and np.diff(np.flatnonzero(side)).max() == 1 for side in (rows, columns))
    assert (wiped.sum((1, 2)) == 16).mean() > 0.5  # the rest lie over an edge
