"""RAEv2's diffusion transformer against an oracle in torch: outputs, loss, gradients, guided trajectories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import raev2_oracle as oracle
from published_cases import write

from rae_jax.build import models, part_weights, published_weights
from rae_jax.build import sampler as build_sampler
from rae_jax.runtime import sharding

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", params=oracle.CASES)
def network(request, tmp_path_factory):
    """(case, arrays of its file, config, parameters)."""
    case = oracle.CASES[request.param]
    path = tmp_path_factory.mktemp("raev2") / "file.safetensors"
    arrays = oracle.weights(case)
    write(path, arrays)
    config = oracle.config_of(case, path)
    return case, arrays, config, part_weights.load(config, "dit", "", sharding.make_mesh(config.mesh))


def _nhwc(x):
    return jnp.moveaxis(jnp.asarray(np.asarray(x)), 1, -1)


def _error(ours, theirs):
    theirs = np.asarray(theirs)
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def _outputs(config, params, x_t, t, labels, base):
    found = models.dit(config).apply({"params": params}, x_t, t, labels, **({"base": True} if base else {}))
    return found if base else (found,)


def test_outputs_loss_and_gradients(network):
    case, arrays, config, params = network
    x, noise, t, labels = oracle.inputs(case)
    w = {name: torch.tensor(array, requires_grad=name != "t_embedder.W") for name, array in arrays.items()}
    x_t = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * noise
    theirs = [y for y in oracle.outputs(w, case, *map(torch.as_tensor, (x_t, t, labels))) if y is not None]
    target = (x_t - x) / np.maximum(t, 0.05)[:, None, None, None]
    velocities = [oracle.velocity(y, torch.as_tensor(x_t), torch.as_tensor(t)) for y in theirs]
    loss = sum(((v - torch.as_tensor(target)) ** 2).mean() for v in velocities)
    loss.backward()
    p, base = build_sampler.prediction(config), bool(case.base_depth)

    def ours_of(params):
        outputs = _outputs(config, params, _nhwc(x_t), t, labels, base)
        errors = [jnp.square(y - p.target(_nhwc(x), _nhwc(noise), t)).mean((1, 2, 3)) * p.weight(t) for y in outputs]
        return sum(error.mean() for error in errors), outputs

    (value, outputs), grads = jax.jit(jax.value_and_grad(ours_of, has_aux=True))(params)
    for ours, expected in zip(outputs, theirs, strict=True):
        assert _error(ours, _nhwc(expected.detach())) < 1e-5
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    found = published_weights.tensors_of(config, "dit", grads)
    for name, tensor in w.items():
        if tensor.grad is not None:
            assert _error(found[name], tensor.grad) < 1e-4, name


def test_bfloat16_stays_close(network):
    case, _, config, params = network
    config = config.copy_and_resolve_references()
    x, _, t, labels = oracle.inputs(case)
    base = bool(case.base_depth)
    whole = jax.jit(lambda x: _outputs(config, params, x, t, labels, base))(_nhwc(x))
    config.dtype = "bfloat16"
    half = jax.jit(lambda x: _outputs(config, params, x, t, labels, base))(_nhwc(x))
    for one, other in zip(whole, half, strict=True):
        assert 1e-5 < np.linalg.norm(one - other) / np.linalg.norm(one) < 0.02


GUIDANCE = {
    "cfg": {"method": "cfg", "scale": 2.0, "t_min": 0.2, "t_max": 0.9},
    "internal": {"method": "internal", "scale": 1.78, "t_min": 0.4, "t_max": 0.95},
    "internal_cfg": {"method": "internal_cfg", "scale": 1.5, "t_min": 0.3, "t_max": 0.95},
}
INSIDE = {"scale": 1.6, "t_min": 0.5, "t_max": 1.0}  # internal_cfg: of the internal guidance
STEPS = 6


def _their_velocity(w, case, guidance, x, t, labels):
    """The guided velocity at one time for all images, in torch."""

    def inner(labels, scale, t_min, t_max):
        full, base = (oracle.velocity(y, x, t) for y in oracle.outputs(w, case, x, t, labels))
        return base + scale * (full - base) if t_min <= float(t[0]) <= t_max else full

    null, acts = torch.full_like(labels, case.num_classes), guidance["t_min"] <= float(t[0]) <= guidance["t_max"]
    if guidance["method"] == "internal":
        return inner(labels, guidance["scale"], guidance["t_min"], guidance["t_max"])
    internal = tuple(INSIDE.values()) if guidance["method"] == "internal_cfg" else (1.0, 0.0, 1.0)
    strong = inner(labels, *internal)
    weak = inner(null, *internal)
    return weak + guidance["scale"] * (strong - weak) if acts else strong


@pytest.mark.parametrize("name", GUIDANCE)
def test_guided_trajectories(network, name):
    case, arrays, config, params = network
    if not case.base_depth:
        pytest.skip("this network has no base output")
    config = config.copy_and_resolve_references()
    config.dit.time_shift = 2.0
    config.sampler.update({"method": "euler", "grid": "plain", "num_steps": STEPS})
    config.guidance.update({**GUIDANCE[name], "internal": INSIDE})
    _, noise, _, labels = oracle.inputs(case)

    @jax.jit
    def solve(noise):
        velocity = build_sampler.velocity(config, {"dit": params}, jnp.asarray(labels))
        return build_sampler.sampler(config).solve(velocity, noise, None)

    times = np.linspace(1, 0, STEPS + 1)
    times = torch.as_tensor(2 * times / (1 + times), dtype=torch.float32)
    w = {key: torch.tensor(array) for key, array in arrays.items()}
    x = torch.as_tensor(noise)
    with torch.no_grad():
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            v = _their_velocity(w, case, GUIDANCE[name], x, t.repeat(len(x)), torch.as_tensor(labels))
            x = x + (t_next - t) * v
    assert _error(solve(_nhwc(noise)), _nhwc(x)) < 1e-4
