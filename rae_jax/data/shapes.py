"""Procedural images of ten shapes: a data set that needs no download.

Image i of a split depends on (seed, split, i) alone, so any image can be drawn in any process and in any order.
"""

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLE = 4  # antialiasing: shapes are drawn larger by this factor, then averaged
MAX_ROTATION = 15.0  # degrees: small, so that orientation is part of a shape
MIN_CONTRAST = 0.6  # Euclidean RGB distance of the shape from every part of the background


def _ring_of_points(num, radius=1.0, start=-90.0, centre=(0.0, 0.0), sweep=360.0):
    angles = np.deg2rad(start + sweep * np.arange(num) / num)
    return radius * np.stack([np.cos(angles), np.sin(angles)], -1) + np.asarray(centre)


def _star(num_points=5, inner=0.42):
    points = _ring_of_points(2 * num_points)
    return points * np.where(np.arange(2 * num_points) % 2, inner, 1.0)[:, None]


def _cross(arm=0.34):
    a, b = arm, 0.95
    return np.array(
        [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    )


def _heart(num=40):
    t = 2 * np.pi * np.arange(num) / num
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], -1) / 16.0


def _arrow():
    return np.array([(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 0.95), (-0.3, 0.95), (-0.3, -0.1), (-0.8, -0.1)], float)


# A shape is a list of (polygon in the unit disc with y pointing down, fill), drawn in this order.
_DISC = _ring_of_points(48)
SHAPES = {
    "disc": [(0.95 * _DISC, 255)],
    "ring": [(_DISC, 255), (0.55 * _DISC, 0)],
    "square": [(_ring_of_points(4, start=45.0), 255)],
    "triangle": [(_ring_of_points(3) + (0.0, 0.15), 255)],
    "star": [(_star(), 255)],
    "cross": [(_cross(), 255)],
    "heart": [(_heart(), 255)],
    "crescent": [(_DISC, 255), (0.85 * _DISC + (0.5, 0.0), 0)],
    "arrow": [(_arrow(), 255)],
    "bar": [(np.array([(-1, -0.28), (1, -0.28), (1, 0.28), (-1, 0.28)], float), 255)],
}
CLASS_NAMES = tuple(SHAPES)


def _coverage(shape, centre, radius, rotation, size):
    """Return the fraction of each pixel that the shape covers, [size, size] in [0, 1]."""
    cos, sin = np.cos(rotation), np.sin(rotation)
    turn = np.array([[cos, sin], [-sin, cos]])
    canvas = Image.new("L", (size * SUPERSAMPLE, size * SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    for polygon, fill in SHAPES[shape]:
        points = (polygon @ turn * radius + centre) * SUPERSAMPLE
        draw.polygon([tuple(p) for p in points], fill=fill)
    return np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / 255.0


def _colours(rng):
    """Draw the two end colours of the background's gradient, and a colour of the shape that contrasts with both."""
    ends = rng.uniform(0.0, 1.0, (2, 3))
    background = np.stack([ends[0], ends.mean(0), ends[1]])
    while True:
        colour = rng.uniform(0.0, 1.0, 3)
        if np.linalg.norm(background - colour, axis=-1).min() >= MIN_CONTRAST:
            return ends, colour


def draw_shape(rng, shape, size):
    """Draw one image: uint8 [size, size, 3]."""
    ends, colour = _colours(rng)
    radius = rng.uniform(0.34, 0.44) * size
    centre = rng.uniform(radius, size - radius, 2)
    rotation = np.deg2rad(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    direction = rng.uniform(0.0, 2 * np.pi)

    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    ramp = np.cos(direction) * axis[None, :] + np.sin(direction) * axis[:, None]
    ramp = (0.5 + ramp / np.sqrt(2.0)).astype(np.float32)[..., None]
    background = ends[0] * (1 - ramp) + ends[1] * ramp
    cover = _coverage(shape, centre, radius, rotation, size)[..., None]
    image = background * (1 - cover) + colour * cover
    return np.round(image * 255.0).astype(np.uint8)


class Shapes:
    """Random-access source of {'image': uint8 [size, size, 3], 'label': int32}; labels in turn."""

    class_names, labelled = CLASS_NAMES, True

    def __init__(self, *, split, num_images, image_size, seed):
        self._stream = {"train": 0, "heldout": 1}[split]
        self._num_images = num_images
        self._size = image_size
        self._seed = seed

    def __len__(self):
        return self._num_images

    def image_names(self):
        """Return the numbers that the images are drawn by."""
        return (((self._seed, self._stream), self._num_images),)

    def __getitem__(self, index):
        label = int(index) % len(CLASS_NAMES)
        rng = np.random.default_rng((self._seed, self._stream, int(index)))
        return {"image": draw_shape(rng, CLASS_NAMES[label], self._size), "label": np.int32(label)}
