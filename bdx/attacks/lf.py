"""LF: a universal perturbation of low frequency, optimised on a clean net, is added.

Source: Zeng et al. 2021, Rethinking the backdoor attacks' triggers: a frequency perspective, ICCV, arXiv 2104.03413, as
BackdoorBench's generator makes it: targeted DeepFool on v + x, v ← smooth(v + smooth(r)), mapped onto [0, 0.2] each time. The
generator takes one image after another and measures its success on images that were normalised before v was added; here
all images of a pass are taken at once and every pixel is in [0,1]. Some of the files shipped with it vanish when cast to
bytes; here v is rounded to whole grey levels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx.attacks.made import Made, Progress
from bdx.errors import UserError
from bdx.split import pieces


class LF(Made):
    """images: training images that v is optimised on. deviation: of the Gaussian low-pass, in pixels of 32. most: the
    highest value of v, in [0,1]. overshoot, iterations: of DeepFool. passes: at most; they end once `fooled` of the images
    change their class, or when five rates in a row lie within 0.01. file: a picture to add instead (black adds nothing)."""

    makes = ("added",)

    def __init__(
        self, net: nn.Module, *, images: int, deviation: float, most: float, overshoot: float, iterations: int,
        passes: int, fooled: float, file: str | None, **common,
    ):  # fmt: skip
        super().__init__(net, **common)
        if min(images, iterations, passes) < 1 or deviation <= 0 or not 1 / 255 <= most <= 1:
            raise UserError(
                f"attack.images={images}, iterations={iterations}, passes={passes}, deviation={deviation}, most={most}: "
                "expected at least 1 of each, a deviation above 0 and 1/255 to 1 as the highest value"
            )
        self.images, self.deviation, self.most, self.overshoot = images, deviation, most, overshoot
        self.iterations, self.passes, self.fooled, self.file = iterations, passes, fooled, file
        self.register_buffer("added", self.own_picture(file))

    @property
    def wanting(self) -> bool:
        return self.file is None and super().wanting

    def smooth(self, v: Tensor) -> Tensor:
        """(1,C,H,W) through a separable Gaussian; zeros outside."""
        for dim, size in ((2, v.shape[2]), (3, v.shape[3])):
            std = self.deviation * size / 32
            reach = min(round(2.5 * std), size - 1)  # 30 taps at 6 pixels
            taps = torch.exp(-torch.arange(-reach, reach + 1.0, device=v.device).square() / (2 * std**2))
            kernel = (taps / taps.sum()).view(1, 1, *((-1, 1) if dim == 2 else (1, -1)))
            v = F.conv2d(v.transpose(0, 1), kernel, padding=(reach, 0) if dim == 2 else (0, reach)).transpose(0, 1)
        return v

    def make(self, data, net, report):
        x = self.images_of(data, self.images)
        before, v = self.classes(net, x), torch.zeros_like(x[:1])
        rates, say = [], Progress(report, "trigger", self.passes)
        for i in range(self.passes):
            still = self.classes(net, (x + v).clamp(0, 1)) == before
            r = self.deepfool(net, (x[still] + v).clamp(0, 1)).sum(0, keepdim=True)
            v = self.smooth(v + self.smooth(r))
            v = (v - v.amin()) / (v.amax() - v.amin()).clamp_min(1e-12) * self.most
            rates.append(float((self.classes(net, (x + v).clamp(0, 1)) != before).float().mean()))
            steady = len(rates) >= 5 and max(rates[-5:]) - min(rates[-5:]) <= 0.01
            done = rates[-1] >= self.fooled or steady
            say(i + 1, 1 - rates[-1], last=done)
            if done:
                break
        return {"added": (v[0] * 255).round() / 255}, {"fooled": rates[-1], "passes": len(rates)}

    @staticmethod
    @torch.no_grad()
    def classes(net: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([net(part).argmax(1) for (part,) in pieces(x)])

    def deepfool(self, net: nn.Module, x: Tensor) -> Tensor:
        """(N,C,H,W): the linearised net's shortest way from each image to the target class, a step at a time for those
        that are not there yet (Moosavi-Dezfooli et al. 2016, towards one class)."""
        total = torch.zeros_like(x)
        for _ in range(self.iterations):
            at = (x + (1 + self.overshoot) * total).requires_grad_()
            logits = net(at)
            away = logits.argmax(1) != self.target
            if not away.any():
                break
            gap = logits.amax(1) - logits[:, self.target]
            (w,) = torch.autograd.grad(gap.sum(), at)
            length = w.flatten(1).square().sum(1).clamp_min(1e-12)
            step = (gap.detach().abs() + 1e-4) / length * away
            total = total - step.view(-1, 1, 1, 1) * w
        return (1 + self.overshoot) * total

    def trigger(self, x: Tensor) -> Tensor:
        return (x + self.added.to(x.device)).clamp(0, 1)
