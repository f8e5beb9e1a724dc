"""FID's InceptionV3: torch-fidelity's features of the same weights, its published file, and rFID.

The goldens (tests/goldens/perception.npz, by make_perception_goldens.py) are what torch-fidelity's own network makes.
"""

import zipfile

import jax
import numpy as np
import perception_cases as cases
import pytest
from etils import epath
from safetensors.numpy import save_file

from configs import small
from rae_jax.build import part_weights
from rae_jax.data.decode import ImageFiles, find_images, read_image
from rae_jax.errors import UserError
from rae_jax.inference import batched, evaluator, perceptual_metrics, reconstruct
from rae_jax.inference.collector import Collector
from rae_jax.models import resize
from rae_jax.runtime import sharding

TOLERANCE = 1e-4  # relative to the largest feature


def _mesh(devices):
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return cases.config_of(cases.write(tmp_path_factory.mktemp("inception"), "inception"))


@pytest.fixture(scope="module")
def params(config):
    return part_weights.load(config, "inception", "", _mesh(1))


def test_features_are_torch_fidelitys(params):
    for size in cases.SIZES:
        image = cases.image(*size)[None] / np.float32(255)
        found = jax.jit(perceptual_metrics.features)(params, image)
        for name, values in found.items():
            golden = cases.goldens()[f"{name}{size[0]}"]
            assert values.shape == (1, *golden.shape) and values.dtype == np.float32
            assert np.abs(values[0] - golden).max() <= TOLERANCE * np.abs(golden).max(), (size, name)


def test_images_are_resized_as_tensorflow_did():
    """Enlarged twice, every second pixel is an old one and the rest lies between; at the far edge it is the last."""
    x = np.random.default_rng(0).random((1, 3, 4, 2), np.float32)
    found = resize.bilinear_tf1(x, 6, 8)
    np.testing.assert_allclose(found[:, ::2, ::2], x, rtol=1e-6)
    np.testing.assert_allclose(found[:, ::2, 1:-1:2], (x[:, :, :-1] + x[:, :, 1:]) / 2, rtol=1e-6)
    np.testing.assert_allclose(found[:, -1], found[:, -2], rtol=1e-6)
    np.testing.assert_array_equal(resize.bilinear_tf1(x, 3, 4), x)
    np.testing.assert_allclose(resize.bilinear_tf1(x, 3, 2), x[:, :, ::2], rtol=1e-6)  # shrunk: some are passed over


def test_wrong_files_are_refused(tmp_path):
    damages = {
        "lacks tensor 'Mixed_7c.branch_pool.bn.running_var'": lambda a: a.pop("Mixed_7c.branch_pool.bn.running_var"),
        "unknown tensor 'AuxLogits.fc.weight'": lambda a: a.update({"AuxLogits.fc.weight": np.zeros(3)}),
        r"'fc.weight' has shape \(1000, 2048\)": lambda a: a.update(
            {"fc.weight": np.zeros((1000, 2048))}
        ),  # torchvision
    }
    path = tmp_path / "file.safetensors"
    for message, damage in damages.items():
        arrays = cases.arrays_of("inception")
        damage(arrays)
        save_file(arrays, path)
        with pytest.raises(UserError, match=message) as refusal:
            part_weights.load(cases.config_of({"inception": str(path)}), "inception", "", _mesh(1))
        assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_metrics_of_sets_are_torch_fidelitys(config, tmp_path):
    """From images of two files to the numbers; by the shipped encoder, which the distance in its space takes."""
    inception = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3",
        reason="torch-fidelity is not installed",
    )
    from torch_fidelity import metric_fid, metric_isc, metric_prc

    torch = pytest.importorskip("torch")
    config = cases.config_of({"inception": config.evaluate.inception}, small.get_config())
    config.stages, config.evaluate.batch_size = (), 8
    found, reference = (np.stack([cases.image(40, 40, seed + i) for i in range(n)]) for seed, n in ((0, 20), (100, 14)))
    found = (found * (0.8 + 0.2 * np.random.default_rng(0).random((20, 1, 1, 3)))).astype(np.uint8)
    paths = {"found": found, "reference": reference}
    for name, images in paths.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    config.evaluate.reference = str(tmp_path / "reference.npz")
    mesh = _mesh(1)
    parts = {name: part_weights.load(config, name, "", mesh) for name in ("encoder", "inception")}
    ours = evaluator.Evaluator(config, mesh).images(parts, str(tmp_path / "found.npz"))

    network_file, names = tmp_path / "inception.pth", ["2048", "logits_unbiased"]
    torch.save({k: torch.from_numpy(v) for k, v in cases.arrays_of("inception").items()}, network_file)
    network = inception.FeatureExtractorInceptionV3("fid", names, feature_extractor_weights_path=network_file)
    (a, logits), (b, _) = (network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())) for x in (found, reference))
    statistics = map(metric_fid.fid_features_to_statistics, (a, b))
    how = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": False, "verbose": False}
    expected = {
        "fid": metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"],
        "inception_score": metric_isc.isc_features_to_metric(logits, splits=1)["inception_score_mean"],
        **metric_prc.prc_features_to_metric(a, b, **how),
    }
    print({name: (ours[name], expected[name]) for name in expected if name in ours}, ours, flush=True)
    assert min(ours["precision"], ours["recall"]) > 0.2 and max(ours["precision"], ours["recall"]) < 1
    for name in ("fid", "inception_score", "precision", "recall"):
        assert ours[name] == pytest.approx(expected[name], rel=1e-4), name


def _moments(config, files, devices, batch_size):
    """Return the moments of the files and of their reconstructions by the shipped weights."""
    mesh = _mesh(devices)
    parts = {name: part_weights.load(config, name, "", mesh) for name in ("encoder", "decoder", "inception")}
    redraw, moments = reconstruct.make(config), Collector(moments=reconstruct.MOMENTS)
    source, shown = ImageFiles(files, config.data.image_size), []
    batches = batched.batches(source, mesh, batch_size=batch_size, num_threads=2, name="test")
    view = batched.compiled(lambda parts, batch: redraw(parts, batch["image"])[1], mesh)
    for out in batched.outputs(view, parts, batches):
        moments.add(out)
        shown.append(out["decoded"])
    return moments, np.concatenate(shown)


@pytest.mark.slow
def test_rfid_is_torch_fidelitys_whatever_the_batch(config, tmp_path):
    """500 real images and what the shipped small RAE makes of them."""
    inception = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3",
        reason="torch-fidelity is not installed",
    )
    from torch_fidelity import metric_fid

    torch = pytest.importorskip("torch")
    archive = cases.SHARED / "cifar10/test.zip"
    if not archive.is_file():
        pytest.skip("../shared/data/cifar10 is not here")
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(tmp_path, sorted(name for name in zipped.namelist() if name.endswith(".jpg"))[::20])
    files = find_images(epath.Path(tmp_path) / "test")
    assert len(files) == 500
    config = cases.config_of({"inception": config.evaluate.inception}, small.get_config())
    config.stages = ()

    network_file = tmp_path / "inception.pth"
    torch.save({k: torch.from_numpy(v) for k, v in cases.arrays_of("inception").items()}, network_file)
    network = inception.FeatureExtractorInceptionV3("fid", ["2048"], feature_extractor_weights_path=network_file)

    def theirs(images):
        batches = np.split(images.transpose(0, 3, 1, 2), range(50, len(images), 50))
        features = torch.cat([network(torch.from_numpy(b.copy()))[0] for b in batches])
        return metric_fid.fid_features_to_statistics(features)

    found, expected = {}, None
    for batch_size in (17, 1, 128):
        moments, decoded = _moments(config, files, 1, batch_size)
        found[batch_size] = reconstruct.rfid(moments)["rfid"]
        if expected is None:
            given = np.stack([read_image(file, 32) for file in files])
            expected = metric_fid.fid_statistics_to_metric(theirs(given), theirs(decoded), False)
            (expected,) = expected.values()
        print(f"batch {batch_size}: {found[batch_size]!r}, torch-fidelity {expected!r}", flush=True)
        assert found[batch_size] == pytest.approx(expected, rel=1e-3)
        assert found[batch_size] == pytest.approx(found[17], rel=1e-4)
