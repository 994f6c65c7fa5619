"""Images: from a file to the patches that the vision tower takes.

An image is resized to a multiple of 28 pixels in both directions, normalised, and cut into patches
of 14 x 14 pixels. Four patches, a cell of 2 x 2, become one token of the decoder.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.uris import follow_uri, is_uri
from hub.config import MERGE, PATCH, PATCH_DIM, TEMPORAL, Grid, find
from hub.errors import InputError, read_json, unreadable

# Not all that PIL knows: for EPS, one, it runs another program on the file.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# What a folder may say of its images, since nothing else is done to them.
FIXED = {
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": TEMPORAL,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": Image.Resampling.BICUBIC,
}

# A path or a URI (data:, file:), a path, a file's bytes, or pixels.
ImageSource = str | Path | bytes | Image.Image


def load_image(source: ImageSource) -> Image.Image:
    """Returns the image that is meant, decoded, in RGB.

    Transparency is laid on white, as qwen_vl_utils does. The EXIF orientation is not applied, as
    in the published processor. Raises InputError, which names the file, for what cannot be decoded
    and for shapes that the model does not take.
    """
    name = str(source) if isinstance(source, str | Path) else "image"
    if len(name) > 400:
        name = f"{name[:80]}..."
    try:
        if isinstance(source, str) and is_uri(source):
            if name[:5].lower() == "data:":
                name = "data URI"
            source = follow_uri(source)
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        image = source
        if not isinstance(source, Image.Image):
            image = Image.open(source, formats=IMAGE_FORMATS)
        if image.mode == "F":
            raise InputError("pixels that are no whole numbers are not supported")
        if image.mode.startswith("I"):  # 16-bit grey, as X-rays have; PIL's conversion would clip
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        smart_resize(image.height, image.width)  # refuses what has no size, or is too narrow
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    except InputError as error:
        reason = str(error)
    except UnidentifiedImageError:
        reason = "not an image of a known format"
        if isinstance(source, str | Path):
            raise unreadable(source, reason) from None
    except Exception as error:  # on damaged files the decoders raise almost anything
        reason = f"image cannot be read ({getattr(error, 'strerror', None) or error})"
    raise InputError(f"{name}: {reason}")


def smart_resize(
    height: int, width: int, *, min_pixels: int = 3136, max_pixels: int = 12845056
) -> tuple[int, int]:
    """Returns (height, width) in multiples of 28, about the same shape, with an area in bounds.

    The published rule to the letter: halves round to even, and with min_pixels == max_pixels the
    area may exceed both. Raises InputError for images of no size or of a ratio over 200.
    """
    if min(height, width) < 1:
        raise InputError(f"image is zero-sized ({width} x {height})")
    if max(height, width) / min(height, width) > 200:
        raise InputError(f"image's aspect ratio is over 200 ({width} x {height})")
    factor = PATCH * MERGE
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


@dataclass(frozen=True)
class ImageConfig:
    """Bounds on an image's area after resizing, in pixels."""

    min_pixels: int = 3136
    max_pixels: int = 12845056

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageConfig":
        """Reads the `image_processor` of processor_config.json, as transformers 5 writes it, or
        preprocessor_config.json, where there is none. (transformers has the same order.)

        The bounds stand there under their older or newer names. Raises InputError for a file that
        lacks them, and for images that are to be cut or normalised otherwise than here.
        """
        path = Path(folder) / "processor_config.json"
        raw = read_json(path).get("image_processor") if path.exists() else None
        if raw is None:
            path = Path(folder) / "preprocessor_config.json"
            raw = read_json(path)
        if not isinstance(raw, dict):
            raise InputError(f"{path}: image_processor is not a JSON object")
        for key, value in FIXED.items():
            if raw.get(key) not in (None, value):
                raise InputError(f"{path}: {key} {raw[key]} is not supported (only {value})")
        bounds = []
        for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            bound = raw.get(key) or find(raw, f"size.{edge}")
            if bound is None:
                raise InputError(f"{path}: field 'min_pixels' or 'max_pixels' is missing")
            if type(bound) is not int or bound < 1:
                raise InputError(f"{path}: {key} must be a whole number above 0, not {bound!r}")
            bounds.append(bound)
        if bounds[0] > bounds[1]:
            raise InputError(f"{path}: min_pixels {bounds[0]} is above max_pixels {bounds[1]}")
        return cls(*bounds)


def image_grid(image: Image.Image, config: ImageConfig = ImageConfig()) -> Grid:
    """Returns the grid (1, rows, columns) of patches that `preprocess_image` cuts an image into."""
    height, width = smart_resize(
        image.height, image.width, min_pixels=config.min_pixels, max_pixels=config.max_pixels
    )
    return 1, height // PATCH, width // PATCH


def preprocess_image(
    source: ImageSource, config: ImageConfig = ImageConfig()
) -> tuple[Tensor, Grid]:
    """Returns an image's patches, float32 [P, 1176], and its grid (1, rows, columns).

    Bit-equal to transformers' Qwen2VLImageProcessor. P = rows * columns; the four patches of a
    2 x 2 cell are neighbours. The 1176 numbers of a patch are ordered (channel, frame, y, x).
    """
    image = load_image(source)
    _, rows, columns = grid = image_grid(image, config)
    image = image.resize((columns * PATCH, rows * PATCH), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.array(image)).float() / 255  # [height, width, channel]
    pixels = (pixels - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)

    # Height and width are each taken apart: cell, patch in the cell, pixel in the patch.
    patches = pixels.view(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    # First which patch (cell row, cell column, row, column), then what is in it (channel, y, x).
    patches = patches.permute(0, 3, 1, 4, 6, 2, 5)
    # The frames of a still image are all the same.
    patches = patches.unsqueeze(5).expand(-1, -1, -1, -1, -1, TEMPORAL, -1, -1)
    return patches.reshape(rows * columns, PATCH_DIM), grid
