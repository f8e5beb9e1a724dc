"""Pictures of images: grids, with or without a caption next to each row."""

import io

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

GAP = 2  # white pixels between images
FONT_SIZE = 14
SHOWN_PER_CLASS = 8
ROWS = 10
ENLARGED_TO = 96  # pixels a side, about, to which smaller images are enlarged


def grid(images, columns):
    """Return one uint8 picture of images uint8 [N, H, W, 3], row by row; gaps and missing images are white."""
    images = np.asarray(images)
    rows = -(-len(images) // columns)
    _, height, width, channels = images.shape
    canvas = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas


def with_captions(picture, captions, *, scale):
    """Return the picture enlarged by `scale`, with one caption to the left of each of its equal rows."""
    picture = Image.fromarray(picture)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    font = ImageFont.load_default(FONT_SIZE)
    margin = round(max(font.getlength(caption) for caption in captions)) + 12
    canvas = Image.new("RGB", (picture.width + margin, picture.height), "white")
    canvas.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(canvas)
    for i, caption in enumerate(captions):
        draw.text((6, (i + 0.5) * picture.height / len(captions)), caption, "black", font, anchor="lm")
    return np.asarray(canvas)


def chosen(labels):
    """Return the indices of the images with labels [N] that `overview` shows: a few of each of the first classes.

    If there is a single class, or one image of each class: the first images.
    """
    classes = list(dict.fromkeys(labels.tolist()))[:ROWS]
    rows = [np.flatnonzero(labels == c)[:SHOWN_PER_CLASS] for c in classes]
    if len(rows) > 1 and max(map(len, rows)) > 1:
        return np.concatenate(rows)
    return np.arange(min(len(labels), ROWS * SHOWN_PER_CLASS))


def overview(images, labels, names):
    """Return a picture of `chosen` images [N, H, W, 3]: a row with a caption for each class that has several images."""
    classes = list(dict.fromkeys(labels.tolist()))
    rows = [images[labels == c] for c in classes]
    columns = min(map(len, rows))
    if len(rows) == 1 or columns == 1:
        return grid(images, min(len(images), SHOWN_PER_CLASS))
    picture = grid(np.concatenate([row[:columns] for row in rows]), columns)
    return with_captions(picture, [names[c] for c in classes], scale=max(1, ENLARGED_TO // images.shape[1]))


def save(path, picture):
    """Write a uint8 picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def enlarged(image, side):
    """Return uint8 [H, W, 3] enlarged by a whole factor to about `side` pixels; a larger image is unchanged."""
    times = max(1, side // max(image.shape[:2]))
    return image.repeat(times, 0).repeat(times, 1)


def latent_colours(latents):
    """Return latents [h, w, D] as colours uint8 [h, w, 3]: the first three principal components of the tokens.

    Each component is scaled to its range between the 1st and the 99th percentile.
    """
    height, width, channels = latents.shape
    tokens = np.asarray(latents, np.float64).reshape(-1, channels)
    _, _, axes = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    values = np.zeros((len(tokens), 3))
    components = (tokens - tokens.mean(0)) @ axes[:3].T
    values[:, : components.shape[1]] = components
    low, high = np.percentile(values, (1, 99), axis=0)
    return _to_uint8((values - low) / np.maximum(high - low, 1e-9)).reshape(height, width, 3)


def heat(values, largest):
    """Return values [H, W] as colours uint8 [H, W, 3]: 0 is black, then red, yellow, and white from `largest` on."""
    return _to_uint8(3.0 * np.asarray(values)[..., None] / largest - np.arange(3))


def _to_uint8(values):
    return np.round(255.0 * np.clip(values, 0.0, 1.0)).astype(np.uint8)
