"""A picture of the user's, as a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from bdx.errors import UserError


def picture(file: str, size: tuple[int, int]) -> Tensor:
    """(3,h,w) in [0,1], resized smoothly to size (h, w). Raises UserError unless `file` is a picture of 8 bits a channel."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":  # `convert` would cut off what exceeds 255
                raise ValueError(f"its values are of mode {image.mode}, expected 0 to 255: grey, RGB or a palette")
            small = image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"attack.file={file} is not an image: {e}") from None
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
