"""Pictures of images: grids, with a caption beside each row where one is wanted."""

import io

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

GAP = 2
FONT_SIZE = 14
SHOWN_PER_CLASS = 8


def grid(images, columns):
    """uint8 [N, H, W, 3] -> one uint8 picture, row by row, white between; the last row is filled with white."""
    images = np.asarray(images)
    rows = -(-len(images) // columns)
    _, height, width, channels = images.shape
    canvas = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas


def with_captions(picture, captions, *, scale):
    """Enlarge a picture by `scale` and write one caption left of each of its equal rows."""
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


def class_grid(images, labels, names, *, scale=3):
    """A row of images for each class of which there are some, with its name."""
    found = [c for c in range(len(names)) if (labels == c).any()]
    rows = [images[labels == c][:SHOWN_PER_CLASS] for c in found]
    columns = min(len(row) for row in rows)
    picture = grid(np.concatenate([row[:columns] for row in rows]), columns)
    return with_captions(picture, [names[c] for c in found], scale=scale)


def save(path, picture):
    """Write a uint8 picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
