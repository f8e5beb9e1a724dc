"""A source whose images tell their own number, for tests of the order in which they are read."""

import numpy as np

from rae_jax.errors import UserError


class Numbers:
    """Image i is full of i; what is random about it can be seen in its pixels. Some of them are broken."""

    def __init__(self, num_images=30, broken=()):
        self._num_images, self._broken = num_images, broken

    def __len__(self):
        return self._num_images

    def __getitem__(self, index):
        if index in self._broken:
            raise UserError(f"image {index} is broken")
        image = np.full((2, 2, 3), index, np.uint8)
        image[:, 0] = 255  # so that a flip shows
        return {"image": image, "label": np.int32(index)}

    def random_crop(self, index, rng):
        example = self[index]
        example["image"][0, 0] = rng.integers(256)
        return example
