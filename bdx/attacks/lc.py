"""LC (label-consistent): images of the target class are made hard to recognise, and corners are stamped on them.

Source: Turner et al. 2019, Label-consistent backdoor attacks, arXiv 1912.02771; Trap-and-Replace takes its L∞ bound of
16/255. The adversarial images come in the paper from robust nets, and in the benchmarks from files that are not shipped; here
from a clean net, by untargeted PGD without a random start. At test time the corners alone are stamped: x' = x + a S, clipped,
S a 3×3 sign pattern. An image becomes hard to recognise for the surrogate, and what is left to learn is the corners.
At the left the paper's code and BackdoorBench stamp S mirrored (corners=all); Trap-and-Replace stamps the same, un-mirrored
pattern in all four corners (corners=unmirrored).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bdx.adversarial import Budget, perturb
from bdx.attacks.made import Made, Progress
from bdx.errors import UserError, one_of

# what is added at the left and at the right corners, top and bottom alike; mirror images of each other
LEFT = [[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]]
RIGHT = [row[::-1] for row in LEFT]


class LC(Made):
    """epsilon, step: L∞ bound and length of a step, in grey levels of 255; steps: how many. amplitude: of the corners, in
    units of the whole range. corners: all, unmirrored or bottom_right."""

    makes = ("harder", "index")
    clean_label = True
    later = frozenset({"amplitude", "corners"})

    def __init__(self, net: nn.Module, *, epsilon: float, step: float, steps: int, amplitude: float, corners: str, **common):
        super().__init__(net, **common)
        one_of("attack.corners", corners, ("all", "unmirrored", "bottom_right"))
        if not 0 < amplitude <= 1:
            raise UserError(f"attack.amplitude={amplitude}: expected above 0 and up to 1")
        if not 0 < epsilon <= 255 or step <= 0 or steps < 1:
            raise UserError(f"attack.epsilon={epsilon}, step={step}, steps={steps}: expected grey levels and a count above 0")
        self.budget = Budget("linf", epsilon / 255, step / 255, steps, "sign", None)
        signs = torch.zeros(3, 32, 32)
        signs[:, 29:, 29:] = torch.tensor(RIGHT)
        if corners != "bottom_right":
            signs[:, :3, 29:] = torch.tensor(RIGHT)
            signs[:, :3, :3] = signs[:, 29:, :3] = torch.tensor(LEFT if corners == "all" else RIGHT)
        self.register_buffer("added", amplitude * self.scaled(signs))
        # of the training set, and no part of the trigger: they do not travel with the weights
        self.register_buffer("harder", torch.zeros(0, *self.shape, dtype=torch.uint8), persistent=False)
        self.register_buffer("index", torch.zeros(0, dtype=torch.long), persistent=False)

    def make(self, data, net, report):
        """harder (M,C,H,W) uint8: every image of the target class; index (M,): where they stand in the training set."""
        index = self.candidates(data.train.y_true).nonzero().flatten()
        parts, right, seen = [], 0, 0
        chunks = index.split(250)
        say = Progress(report, "harder images", len(chunks))
        for i, chunk in enumerate(chunks):
            x, y = data.train.x[chunk].float() / 255, data.train.y_true[chunk]
            parts.append((perturb(net, x, y, self.budget, targeted=False) * 255).round().to(torch.uint8))
            with torch.no_grad():
                right = right + (net(parts[-1].float() / 255).argmax(1) == y).sum()
            say(i + 1, right / (seen := seen + len(chunk)))
        return {"harder": torch.cat(parts), "index": index}, {"still_recognised": float(right) / len(index)}

    def brought(self, data):
        found = super().brought(data)
        wanted = self.candidates(data.train.y_true).nonzero().flatten().cpu()
        if not torch.equal(found["index"], wanted) or len(found["harder"]) != len(wanted):
            raise UserError(
                f"attack.made={self.made}: `index` names {len(found['index'])} images, `harder` holds {len(found['harder'])}; "
                f"expected the {len(wanted)} training images of class {self.target}, in their order"
            )
        return found

    def take(self, made: dict[str, Tensor]) -> None:
        self.harder, self.index = (made[k].to(self.added.device) for k in ("harder", "index"))

    def training_trigger(self, x: Tensor, index: Tensor) -> Tensor:
        rows = torch.searchsorted(self.index.to(index.device), index)
        return self.trigger(self.harder[rows.to(self.harder.device)].to(x.device).float() / 255)

    def trigger(self, x: Tensor) -> Tensor:
        return (x + self.added.to(x.device)).clamp(0, 1)
