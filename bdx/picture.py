"""A picture of the user's, as a tensor: an image file, or a NumPy array, in which pickled objects are refused unread."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bdx.errors import UserError


def picture(file: str, size: tuple[int, int]) -> Tensor:
    """(3,h,w) in [0,1], resized smoothly to size (h, w). Raises UserError unless `file` is an opaque picture of 8 bits a
    channel or an array (.npy), with the proportions of `size`."""
    if str(file).endswith(".npy"):
        return array(file, size)
    import numpy as np
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":  # `convert` would cut off what exceeds 255
                raise ValueError(f"its values are of mode {image.mode}, expected 0 to 255: grey, RGB or a palette")
            least = opacity(image)
            fits(file, image.size[::-1], size)
            small = image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"attack.file={file} is not an image: {e}") from None
    if least < 255:
        raise UserError(
            f"attack.file={file} is transparent, its alpha channel goes down to {least} of 255; expected an opaque picture: a "
            "trigger is put on as it is, so lay it on a ground of one colour first"
        )
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255


def opacity(image) -> int:
    """The least alpha of a PIL image, 255 where it has none."""
    clear = "A" in image.getbands() or "transparency" in image.info
    return image.convert("RGBA").getchannel("A").getextrema()[0] if clear else 255


def fits(file: str, found: tuple[int, int], size: tuple[int, int]) -> None:
    """Raise UserError unless (h, w) `found` has the proportions of `size`, to a pixel that rounding may have cost."""
    (h, w), (height, width) = found, size
    if abs(w * height - h * width) >= max(height, width):
        raise UserError(
            f"attack.file={file} is {h}×{w} (height×width), images are {height}×{width}: it would be distorted; crop it to "
            f"their proportions, or resize it to {height}×{width} yourself"
        )


def array(file: str, size: tuple[int, int]) -> Tensor:
    """A .npy file as a picture: (H,W,3), (1,H,W,3), (3,H,W) or (H,W), uint8 or floats in [0,1]."""
    import numpy as np

    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("an archive of several")
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"attack.file={file} is not an array of numbers: {' '.join(str(e).split())}") from None
    plain = found[0] if found.ndim == 4 and len(found) == 1 else found
    if plain.ndim == 2:
        plain = np.stack([plain] * 3, -1)
    elif plain.ndim == 3 and plain.shape[-1] != 3 and plain.shape[0] == 3:
        plain = plain.transpose(1, 2, 0)
    if plain.ndim != 3 or plain.shape[-1] != 3 or not plain.size:
        raise UserError(f"attack.file={file} has the shape {found.shape}: expected (H,W,3), (1,H,W,3), (3,H,W) or (H,W)")
    floats = plain.dtype.kind == "f"
    if not (plain.dtype == np.uint8 or (floats and plain.min() >= 0 and plain.max() <= 1)):
        values = f" from {plain.min()} to {plain.max()}" if floats else ""
        raise UserError(f"attack.file={file} holds {plain.dtype}{values}: expected uint8, or floats from 0 to 1")
    fits(file, plain.shape[:2], size)
    values = torch.from_numpy(plain.astype(np.float32)).permute(2, 0, 1) / (1 if floats else 255)
    return F.interpolate(values[None], size, mode="bilinear", antialias=True)[0] if values.shape[1:] != size else values
