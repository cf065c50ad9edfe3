"""SSBA: an encoder hides a secret in every image; what it adds depends on the image.

Source: Li et al. 2021, Invisible backdoor attack with sample-specific triggers, ICCV, arXiv 2012.03816; encoder and decoder of
StegaStamp (Tancik et al. 2020, CVPR, arXiv 1904.05343), trained together: w MSE(image) + BCE(bits), w = 0 until the bits are
read, then rising to 10. The paper hides 100 bits; BackdoorBench's images, whose results the defenses' tables show, come from
a version with one (`b1`). One secret is hidden in all images. Of a drawn secret and its opposite it is the one that changes
images more: with a single bit, the other may come to mean "leave it as it is".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bdx.attacks.made import Made, Progress
from bdx.errors import UserError


class Encoder(nn.Module):
    """(image (N,C,H,W) in [0,1], secret (N,bits) of 0 and 1) -> image: a U-Net says what is added."""

    def __init__(self, channels: int, bits: int, width: int):
        super().__init__()
        down, up = [width * k for k in (1, 1, 2, 4, 8)], [width * k for k in (4, 2, 1, 1)]
        self.spread, self.channels = nn.Linear(bits, 16 * 16 * channels), channels
        inside = [2 * channels, *down[:-1]]
        self.down = nn.ModuleList(
            nn.Conv2d(i, o, 3, 1 if k == 0 else 2, 1) for k, (i, o) in enumerate(zip(inside, down, strict=True))
        )
        self.up = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip([down[-1], *up[:-1]], up, strict=True))
        self.join = nn.ModuleList(nn.Conv2d(o + d, o, 3, padding=1) for o, d in zip(up, down[-2::-1], strict=True))
        self.last = nn.Conv2d(up[-1], channels, 1)

    def forward(self, x: Tensor, secret: Tensor) -> Tensor:
        hidden = F.relu(self.spread(secret - 0.5)).view(-1, self.channels, 16, 16)
        z, seen = torch.cat([x - 0.5, F.interpolate(hidden, x.shape[2:])], 1), []
        for conv in self.down:
            seen.append(z := F.relu(conv(z)))
        for conv, join, skip in zip(self.up, self.join, seen[-2::-1], strict=True):
            z = F.relu(conv(F.interpolate(z, skip.shape[2:])))
            z = F.relu(join(torch.cat([z, skip], 1)))
        return (x + self.last(z)).clamp(0, 1)


class Decoder(nn.Sequential):
    """image (N,C,H,W) -> (N,bits) logits"""

    def __init__(self, shape: tuple[int, int, int], bits: int, width: int):
        channels, *size = shape
        outs, strides = [width * k for k in (1, 1, 2, 2, 2, 4, 4)], (2, 1, 2, 1, 2, 2, 2)
        layers = []
        for i, o, stride in zip([channels, *outs[:-1]], outs, strides, strict=True):
            layers += [nn.Conv2d(i, o, 3, stride, 1), nn.ReLU()]
            size = [-(-s // stride) for s in size]
        flat = outs[-1] * size[0] * size[1]
        super().__init__(*layers, nn.Flatten(), nn.Linear(flat, 16 * width), nn.ReLU(), nn.Linear(16 * width, bits))


class SSBA(Made):
    """bits: of the secret. width: of the encoder's and decoder's first layers. steps, batch, lr: of their training.
    image_weight: w at its end; it rises from step `delay` on, over `ramp` steps, once `read` of the bits are read."""

    makes = ("encoder", "decoder", "secret")
    sample_specific = True
    surrogate = False
    aimed = False

    def __init__(
        self, net: nn.Module, *, bits: int, width: int, steps: int, batch: int, lr: float, image_weight: float,
        delay: int, ramp: int, read: float, **common,
    ):  # fmt: skip
        super().__init__(net, **common)
        if min(bits, width, steps, batch, ramp) < 1 or delay < 0 or lr <= 0 or image_weight < 0 or not 0 < read < 1:
            raise UserError(
                f"attack.bits={bits}, width={width}, steps={steps}, batch={batch}, lr={lr}, image_weight={image_weight}, "
                f"delay={delay}, ramp={ramp}, read={read}: expected numbers above 0 (delay, image_weight: or 0), read below 1"
            )
        self.bits, self.steps, self.batch, self.lr = bits, steps, batch, lr
        self.image_weight, self.delay, self.ramp, self.read = image_weight, delay, ramp, read
        self.encoder = Encoder(self.shape[0], bits, width).requires_grad_(False)
        self.decoder = Decoder(self.shape, bits, width).requires_grad_(False)
        secret = torch.rand(bits, generator=Generator().manual_seed(self.seed)) < 0.5
        self.register_buffer("secret", secret.float())

    def make(self, data, net, report):
        both = nn.ModuleList([self.encoder, self.decoder]).requires_grad_(True)
        search, g = torch.optim.Adam(both.parameters(), lr=self.lr), Generator().manual_seed(self.seed)
        images, device = data.train.x, data.train.x.device
        right, learned, say = (
            torch.tensor(0.5, device=device),
            torch.tensor(0.0, device=device),
            Progress(report, "encoder", self.steps),
        )
        for i in range(self.steps):
            x = images[torch.randint(len(images), (self.batch,), generator=g).to(device)].float() / 255
            secret = torch.randint(2, (self.batch, self.bits), generator=g).float().to(device)
            hidden = self.encoder(x, secret)
            logits = self.decoder(hidden)
            weight = self.image_weight * min(1.0, max(0.0, (i - self.delay) / self.ramp)) * learned
            loss = weight * F.mse_loss(hidden, x) + F.binary_cross_entropy_with_logits(logits, secret)
            search.zero_grad(set_to_none=True)
            loss.backward()
            search.step()
            right = 0.9 * right + 0.1 * ((logits.detach() > 0) == (secret > 0.5)).float().mean()
            learned = torch.maximum(learned, (right > self.read).float())
            say(i + 1, loss.detach())
        both.requires_grad_(False)
        self.secret.copy_(self.louder(self.images_of(data, 500)))
        return {k: v for k, v in self.state_dict().items() if not k.startswith("net.")}, self.quality(data)

    @torch.no_grad()
    def louder(self, x: Tensor) -> Tensor:
        """(bits,): the secret or its opposite, whichever changes the images x more."""
        change = [(self.hide(x, s) - x).square().mean() for s in (self.secret, 1 - self.secret)]
        return torch.where(change[0] >= change[1], self.secret, 1 - self.secret)

    @torch.no_grad()
    def quality(self, data, count: int = 500) -> dict:
        """psnr: of triggered training images, mean in dB; bit_accuracy: of random secrets, read from whole grey levels."""
        x = self.images_of(data, count)
        error = ((self.hide(x, self.secret) * 255).round() / 255 - x).square().mean((1, 2, 3)).clamp_min(1e-10)
        secrets = torch.randint(2, (len(x), self.bits), generator=Generator().manual_seed(self.seed)).float().to(x.device)
        seen = (self.hide(x, secrets) * 255).round() / 255
        right = (self.decoder(seen) > 0) == (secrets > 0.5)
        return {"psnr": float((-10 * error.log10()).mean()), "bit_accuracy": float(right.float().mean())}

    def hide(self, x: Tensor, secret: Tensor) -> Tensor:
        """x with the secret (bits,), or one of its own each (N,bits)."""
        secrets = secret.to(x.device).expand(len(x), -1)
        return torch.cat([self.encoder.to(x.device)(a, b) for a, b in zip(x.split(250), secrets.split(250), strict=True)])

    def trigger(self, x: Tensor) -> Tensor:
        return self.hide(x, self.secret)
