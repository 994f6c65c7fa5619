"""Images: from a file to the patches that the vision tower takes."""

import base64
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from hub.errors import InputError, read_json


PATCH, MERGE, TEMPORAL = (
    14,
    2,
    2,
)  # pixels; patches per merged cell's side; frames per patch (a still is repeated)
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "JPEG2000",
)  # not EPS: PIL runs a program for it


def smart_resize(
    height: int, width: int, *, factor: int = 28, min_pixels: int = 3136, max_pixels: int = 12845056
) -> tuple[int, int]:
    """(height, width) in multiples of `factor`, about the same shape, with an area from min_pixels to max_pixels.

    The published rule to the letter: halves round to even; with min_pixels == max_pixels the area may exceed both.
    """
    if min(height, width) < 1:
        raise InputError(f"image is zero-sized ({width} x {height})")
    if max(height, width) / min(height, width) > 200:
        raise InputError(f"image's aspect ratio is over 200 ({width} x {height})")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


@dataclass(frozen=True)
class ImageConfig:
    """Bounds on an image's area after resizing, in pixels."""

    min_pixels: int = 3136
    max_pixels: int = 12845056

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageConfig":
        """Of `preprocessor_config.json`: min_pixels, max_pixels or (newer files) size.shortest_edge, .longest_edge."""
        path = Path(folder) / "preprocessor_config.json"
        raw = read_json(path)
        fixed = {
            "patch_size": PATCH,
            "temporal_patch_size": TEMPORAL,
            "merge_size": MERGE,
            "resample": 3,
            "image_mean": list(IMAGE_MEAN),
            "image_std": list(IMAGE_STD),
        }
        for key, value in fixed.items():
            if raw.get(key, value) != value:
                raise InputError(
                    f"{path}: field '{key}' is {raw[key]!r}, only {value} is supported"
                )
        size = raw.get("size") if isinstance(raw.get("size"), dict) else {}
        low = size.get("shortest_edge") if raw.get("min_pixels") is None else raw["min_pixels"]
        high = size.get("longest_edge") if raw.get("max_pixels") is None else raw["max_pixels"]
        if type(low) is not int or type(high) is not int or not 1 <= low <= high:
            raise InputError(
                f"{path}: fields 'min_pixels' and 'max_pixels' must be whole numbers, 1 <= min <= max, "
                f"but are {low!r} and {high!r}"
            )
        return cls(low, high)


def load_image(source: str | Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """An RGB image from a path, a data URI, a file's bytes or a PIL image; `name` stands for it in complaints.

    Transparency is laid on white (as qwen_vl_utils does), 16-bit grey is scaled to 8 bits. The EXIF orientation is
    not applied, as in the published processor. Of an animation the first frame is taken.
    """
    is_uri = isinstance(source, str) and source.startswith("data:")
    name = name or (
        "data URI" if is_uri else str(source) if isinstance(source, str | Path) else "image"
    )
    try:
        if is_uri:
            header, _, body = source.partition(";base64,")
            source = base64.b64decode(body if body else header, validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # PIL's warnings of large and of odd files: we refuse, or take them
            if not isinstance(source, Image.Image):
                source = Image.open(
                    io.BytesIO(source) if isinstance(source, bytes) else source,
                    formats=IMAGE_FORMATS,
                )
            width, height = source.size  # from the header: nothing is decoded yet
            if width * height > 100_000_000:
                raise InputError(f"image is over 100 megapixels ({width} x {height})")
            smart_resize(height, width)  # complains of zero-sized and of too narrow ones
            return _to_rgb(source)
    except InputError as error:
        reason = str(error)
    except UnidentifiedImageError:
        reason = f"not an image of a known format ({', '.join(IMAGE_FORMATS)}), or zero-sized"
    except Image.DecompressionBombError:
        reason = "image is over 100 megapixels"
    except Exception as error:  # on damaged files the decoders raise almost anything
        reason = f"image cannot be read ({getattr(error, 'strerror', None) or ' '.join(str(error).split())})"
    raise InputError(f"{name}: {reason}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if (
        image.mode[0] in "IF"
    ):  # 16-bit grey, which PIL also hands out as 32; its own conversion to 8 would clip
        wide = image.convert("I")
        if image.mode == "F" or wide.getextrema()[0] < 0 or wide.getextrema()[1] > 65535:
            raise InputError("image has more than 16 bits per channel")
        image = wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")
        image.info.pop("transparency", None)  # a 16-bit value; such a colour stays opaque
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


Grid = tuple[int, int, int]  # (1, rows, columns) of patches
ImageSource = (
    str | Path | bytes | Image.Image
)  # a path or data URI, a path, a file's bytes, a decoded image


def image_grid(image: Image.Image, config: ImageConfig = ImageConfig()) -> Grid:
    """Returns the grid (1, rows, columns) of patches that `preprocess_image` cuts an image into."""
    height, width = smart_resize(
        image.height, image.width, min_pixels=config.min_pixels, max_pixels=config.max_pixels
    )
    return 1, height // PATCH, width // PATCH


def preprocess_image(
    image: Image.Image, config: ImageConfig = ImageConfig()
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Patches float32 [P, 1176] and the grid (1, rows, columns), bit-equal to transformers' Qwen2VLImageProcessor.

    P = rows * columns; the four patches of a merged 2 x 2 cell are neighbours. In a patch: (channel, frame, y, x).
    """
    height, width = smart_resize(
        image.height, image.width, min_pixels=config.min_pixels, max_pixels=config.max_pixels
    )
    resized = load_image(image).resize((width, height), Image.Resampling.BICUBIC)
    pixels = (
        torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        .view(height, width, 3)
        .float()
        / 255
    )
    pixels = (pixels - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    rows, columns = height // PATCH, width // PATCH
    patches = pixels.view(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    patches = patches.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(
        5
    )  # cell row, cell column, row, column, channel, 1, y, x
    patches = patches.expand(-1, -1, -1, -1, -1, TEMPORAL, -1, -1)
    return patches.reshape(rows * columns, 3 * TEMPORAL * PATCH * PATCH), (1, rows, columns)
