"""The demo: its model, and the requests that it refuses."""

import asyncio
import socket

import jax
import numpy as np
import pytest
from conftest import one_device, random_like, tiny
from PIL import Image

from rae_jax.build import data as build_data
from rae_jax.build import models, part_weights
from rae_jax.cli import demo
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.inference import generate, image_grid
from rae_jax.models.autoencoder import to_uint8
from rae_jax.ui import demo_model


def _model(config):
    parts = ("encoder", "decoder", config_keys.generator(config))
    shapes = {part: part_weights.shapes(config, part) for part in parts}
    parts = random_like(shapes, seed=0, scale=0.2)
    latent = config_keys.latent_shape(config)
    parts["statistics"] = {"mean": np.zeros(latent, np.float32), "var": np.ones(latent, np.float32)}
    return demo_model.DemoModel(config.lock(), parts), config, parts


@pytest.fixture(scope="module")
def whole():
    return _model(tiny())


@pytest.mark.parametrize("method", ["internal", "internal_cfg", "mean_velocity"])
def test_raev2_s_dit_and_its_student_show_their_samples(method):
    config, student = tiny(), method == "mean_velocity"
    config.dit.update({"conditioning": "in_context", "depth": 2, "base_depth": 1, "prediction": "data_in_velocity"})
    (config.sampler if student else config.guidance).method = method
    config.guidance.update({"scale": 9.0, "t_min": 0.1})
    model, config, parts = _model(config)
    assert (model.has("few_step"), model.has("dit"), model.guided) == (student, not student, True)
    if student:
        ends, other = (model.draw(4, 9, angle, 3) for angle in (0.0, 20.0))
    else:
        (*_, (_, ends)), (*_, (_, other)) = (model.trajectory(4, 9, scale, 3) for scale in (9.0, 1.0))
    indices = np.arange(demo_model.NUM_IMAGES, dtype=np.uint32)
    wanted, _ = generate.make_sampler(config, one_device())(parts, jax.random.key(9), indices, np.full(len(indices), 4))
    assert np.abs(np.int32(ends) - np.int32(wanted)).max() <= 1
    assert np.abs(np.int32(ends) - np.int32(other)).max() > 1


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, ["dit"]),
        ({"stages": ("dit", "few_step")}, ["dit"]),  # the student is not trained yet
        ({"stages": ("few_step",), "sampler.method": "mean_velocity"}, ["few_step"]),
        ({"sampler.method": "mean_velocity", "few_step.weights": "student.pt"}, ["few_step"]),  # the DiT need not fit
    ],
)
def test_only_the_config_s_generator_is_shown_of_those_that_the_run_did_not_train(changes, shown, tmp_path):
    config = tiny()
    config.stages = ()
    config.update_from_flattened_dict(changes)
    assert [part for part in config_keys.GENERATORS if demo._is_shown(config, part, tmp_path)] == shown


def test_a_trajectory_ends_in_the_sample_and_compiles_once(whole):
    model, config, parts = whole
    ends = {}
    for steps, scale in ((3, 2.5), (12, 2.5), (3, 1.0)):
        found = list(model.trajectory(4, 9, scale, steps))
        assert 4 <= len(found) <= min(steps + 1, demo_model.SNAPSHOTS)
        times = [t for t, _ in found]
        assert times[0] == 1.0 and times[-1] == 0.0 and times == sorted(times, reverse=True)
        ends[steps, scale] = np.int32(found[-1][1])
    assert model._step._cache_size() == model._decode._cache_size() == 1
    indices = np.arange(demo_model.NUM_IMAGES, dtype=np.uint32)
    labels = np.full(len(indices), 4)
    wanted, _ = generate.make_sampler(config, one_device())(parts, jax.random.key(9), indices, labels)
    assert np.abs(ends[3, 2.5] - np.int32(wanted)).max() <= 1
    assert np.abs(ends[3, 1.0] - ends[3, 2.5]).max() > 1


def test_reconstructions_and_what_is_between_two(whole):
    model, config, parts = whole
    one, other = (build_data.source(config, "heldout")[i]["image"] for i in (0, 1))
    decoded, latents, scores = model.reconstruct(one)
    assert decoded.shape == one.shape and latents.shape == config_keys.latent_shape(config)
    mse = np.square(decoded / 255.0 - one / 255.0).mean()
    assert scores["psnr"] == pytest.approx(-10 * np.log10(mse), abs=1e-3)
    between = model.between(one, other)
    assert between.shape == (demo_model.BETWEEN, *one.shape)
    ends = [model.reconstruct(image)[1] for image in (one, other)]
    auto = models.autoencoder(config)
    wanted = to_uint8(auto.decode(parts["decoder"], np.stack([ends[0], (ends[0] + ends[1]) / 2, ends[1]])))
    assert np.abs(np.int32(between[[0, demo_model.BETWEEN // 2, -1]]) - np.int32(wanted)).max() <= 1


def test_colours_tell_tokens_apart():
    latents = np.zeros((4, 4, 16))
    latents[:2, :, 3], latents[:, :2, 5] = 2.0, 1.0
    colours = image_grid.latent_colours(latents)
    assert colours.shape == (4, 4, 3) and len(np.unique(colours.reshape(-1, 3), axis=0)) == 4
    assert image_grid.latent_colours(np.ones((1, 1, 2))).shape == (1, 1, 3)
    np.testing.assert_array_equal(image_grid.heat(np.array([[0.0, 0.5, 1.0, 9.0]]), 1.0)[0, :, 1], [0, 128, 255, 255])
    assert image_grid.enlarged(np.zeros((32, 16, 3), np.uint8), 100).shape == (96, 48, 3)
    assert demo_model.error_map(np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)).min() == 255


def test_uploads_are_bounded_and_named(tmp_path):
    good = tmp_path / "good.webp"
    Image.new("RGB", (70, 40), "red").save(good)
    assert demo_model.read_upload(good, 32).shape == (32, 32, 3)
    Image.new("1", (8000, 6000)).save(tmp_path / "huge.png")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "script.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    whole = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:3000])
    for name, words in (
        ("huge.png", "million"),
        ("text.jpg", "no image"),
        ("script.eps", "no image"),
        ("half.png", "damaged"),
    ):
        with pytest.raises(UserError, match=words) as error:
            demo_model.read_upload(tmp_path / name, 32)
        assert str(error.value).startswith(name) and str(tmp_path) not in str(error.value)


def test_requests_are_bounded():
    pytest.importorskip("gradio", reason="gradio is not installed")
    from rae_jax.ui import demo_page

    def ask(path, size, declared):
        sent, answers = [b"x" * 50_000] * (size // 50_000), []

        async def receive():
            return {"type": "http.request", "body": sent.pop(), "more_body": bool(sent)}

        async def send(message):
            answers.append(message)

        async def app(scope, receive, send):
            while (message := await receive())["type"] != "http.disconnect":
                if not message["more_body"]:
                    return answers.append("whole")
            answers.append("cut off")

        headers = [(b"content-length", str(size).encode())] if declared else []
        scope = {"type": "http", "path": path, "headers": headers}
        asyncio.run(demo_page.BoundedBodies(app)(scope, receive, send))
        return answers[0] if isinstance(answers[0], str) else answers[0]["status"]

    assert ask("/gradio_api/queue/join", 100_000, True) == "whole"
    assert ask("/gradio_api/queue/join", 400_000, True) == 413
    assert ask("/gradio_api/queue/join", 400_000, False) == "cut off"
    assert ask("/gradio_api/upload", 5_000_000, True) == "whole"
    assert ask("/gradio_api/upload", 30_000_000, True) == 413


def test_a_port_that_is_taken_is_named():
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    from rae_jax.ui import demo_page

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port} .*: choose another port"):
            demo_page.serve(gradio.Blocks(analytics_enabled=False), host="127.0.0.1", port=port)
