"""BadNets: a patch, of one value or a 3×3 grid, is pasted into a corner.

Source: Gu et al. 2017, BadNets, arXiv 1708.06733; x' = v c inside the patch and x elsewhere, with v the value and c, 0 or 1,
its cells. A white 3×3 square at the lower right at 32×32, 6×6 at 64×64 (NPD sec. 4.1). The benchmark resizes a 32×32 picture
of the patch and gets a soft-edged 7×7 footprint at 64×64; here the patch has exact edges at every size. Trap-and-Replace's
ImageNet-12 has a grid of its own, of 10×10 pixels a cell 32 off the upper left corner of 256×256: pattern=grid_imagenet12
patch=3.75 margin=4 position=top_left.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bdx.attacks.base import Attack
from bdx.errors import UserError, one_of

CELLS = {
    "solid": [[1.0]],
    "grid": [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]],  # Trap-and-Replace, app. B.1
    "grid_imagenet12": [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]],  # Trap-and-Replace's code, on ImageNet-12
}


class BadNets(Attack):
    """patch: side in pixels of a 32×32 image, scaled with the height and rounded; large images hold fractions of them.
    position: corner. margin: pixels to the border, scaled too. value: of the patch, in [0,1]. pattern: solid; grid or
    grid_imagenet12: 3×3 cells, some of which have the value, others 0."""

    def __init__(self, net, *, patch: float, position: str, margin: float, value: float, pattern: str, **common):
        super().__init__(net, **common)
        _, h, w = self.shape
        side, gap = round(patch * h / 32), round(margin * h / 32)
        if side < 1 or margin < 0 or patch + margin > 32 or side + gap > min(h, w):
            raise UserError(
                f"attack.patch={patch} with margin={margin} is {side}+{gap} pixels: images are {h}×{w}; expected pixels of a "
                "32×32 image, a patch and a margin that fit into it, which are scaled afterwards"
            )
        if not 0 <= value <= 1:
            raise UserError(f"attack.value={value}: expected a pixel value between 0 and 1")
        one_of("attack.pattern", pattern, CELLS)
        tops = {"top": gap, "bottom": h - gap - side}
        lefts = {"left": gap, "right": w - gap - side}
        try:
            vertical, horizontal = position.split("_")
            top, left = tops[vertical], lefts[horizontal]
        except (ValueError, KeyError):
            raise UserError(f"attack.position={position}: expected (top|bottom)_(left|right)") from None
        self.rows, self.cols = slice(top, top + side), slice(left, left + side)
        cells = torch.tensor(CELLS[pattern])[None, None]
        self.cells = value * F.interpolate(cells, (side, side), mode="nearest")[0, 0]

    def trigger(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, self.rows, self.cols] = self.cells.to(x)
        return x
