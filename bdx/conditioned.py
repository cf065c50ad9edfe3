"""Polarizers that look at a class: CNPD's three forms, on feature maps and on a transformer's tokens.

Source: Zhu et al., Class-Conditional Neural Polarizer, 2025, arXiv 2502.18520. Only its abstract could be read: what is
said there is built here, every other choice is an assumption of ours and a switch in conf/defense/cnpd_r.yaml.

Each is called with z (N, C, H, W), or tokens (N, …, C), and `label`: (G,) int64 or (G, K) probabilities, one for each
consecutive group of N/G images, so that (N,) are labels per image and (K,) a batch stacked once per class. All start as
the identity, whatever the label.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx.errors import UserError, one_of
from bdx.polarizers import Polarizer

SOURCES = ("predicted", "oracle", "wrong", "random", "none")


def condition(source: str, *, soft: bool, target: int, classes: int) -> dict:
    """Where a repaired net takes its label from: predicted by the net without polarizer (soft: its probabilities), oracle
    (the attack's target), wrong (the class after it), random (drawn with a fixed seed) or none (one polarizer for all)."""
    one_of("defense.condition", source, SOURCES)
    if soft and source != "predicted":
        raise UserError(f"defense.soft=true: there are probabilities with condition=predicted alone, not with {source}")
    return {"source": source, "soft": soft, "label": {"oracle": target, "wrong": (target + 1) % classes}.get(source, 0)}


def label_of(how: dict, logits: Tensor) -> Tensor:
    """(N,) or (N, K) labels as `how` says, from the logits (N, K) of the net without polarizer."""
    n, k = logits.shape
    if how["source"] == "predicted":
        return logits.float().softmax(1) if how["soft"] else logits.argmax(1)
    if how["source"] == "random":
        return torch.randint(k, (n,), generator=torch.Generator().manual_seed(0)).to(logits.device)
    return torch.full((n,), how["label"], device=logits.device)


def pick(table: Tensor, label: Tensor) -> Tensor:
    """Entries of table (K, …) for labels (G,), or mixtures of them for probabilities (G, K)."""
    if label.ndim == 1:
        return table[label]
    return (label.to(table.dtype) @ table.flatten(1)).view(len(label), *table.shape[1:])


class ClassNorm(nn.Module):
    """BatchNorm with statistics and weights for each of K classes, over rows (G, M, C) with a label for each group."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.eps, self.momentum = 1e-5, 0.1
        self.weight = nn.Parameter(torch.ones(classes, channels))
        self.bias = nn.Parameter(torch.zeros(classes, channels))
        self.register_buffer("running_mean", torch.zeros(classes, channels))
        self.register_buffer("running_var", torch.ones(classes, channels))

    def forward(self, rows: Tensor, label: Tensor, before: Tensor) -> Tensor:
        mean, var = self.statistics(rows, label) if self.training else (self.running_mean, self.running_var)
        scale = self.weight / (var + self.eps).sqrt()  # per class, so that probabilities mix affine maps
        scale, shift = pick(scale, label)[:, None], pick(self.bias - mean * scale, label)[:, None]
        return (rows.float() * scale + shift).to(rows.dtype)

    def statistics(self, rows: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (K, C) of this batch, class by class; the running ones where a class is missing."""
        if label.ndim == 2:
            raise ValueError("batch statistics need hard labels (G,), not probabilities")
        rows, hot = rows.float(), F.one_hot(label, len(self.weight)).float()
        count = hot.sum(0)[:, None] * rows.shape[1]
        with torch.autocast(rows.device.type, enabled=False):  # as BatchNorm's own are
            mean = hot.T @ rows.sum(1) / count.clamp_min(1)
            var = hot.T @ (rows - mean[label][:, None]).square().sum(1) / count.clamp_min(1)
        with torch.no_grad():
            rate = self.momentum * (count > 0)
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(var * count / (count - 1).clamp_min(1), rate)
        return torch.where(count > 0, mean, self.running_mean), torch.where(count > 0, var, self.running_var)


class TokenNorm(nn.Module):
    """LayerNorm of each token, with weights for each of K classes. restore: every token gets the mean and deviation back
    that it had before the linear map, so that an identity map stays the identity (ours)."""

    def __init__(self, classes: int, channels: int, restore: bool):
        super().__init__()
        self.eps, self.restore = 1e-6, restore
        self.weight = nn.Parameter(torch.ones(classes, channels))
        self.bias = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, rows: Tensor, label: Tensor, before: Tensor) -> Tensor:
        out = F.layer_norm(rows.float(), rows.shape[-1:], eps=self.eps)
        out = out * pick(self.weight, label)[:, None] + pick(self.bias, label)[:, None]
        if self.restore:
            var, mean = torch.var_mean(before.float(), -1, correction=0, keepdim=True)
            out = out * (var + self.eps).sqrt() + mean
        return out.to(rows.dtype)


class Rows(Polarizer):
    """What the forms share: images become rows (G, M, C), a linear map and a norm work on those. classes: K.
    tokens: the last dimension is C, and LayerNorm stands in for BatchNorm. restore: see TokenNorm."""

    by_image = False  # whether `purify` wants a label and rows for each image, whatever the groups

    def __init__(self, channels: int, *, classes: int, tokens: bool, restore: bool, norms: int):
        super().__init__(channels)
        self.classes, self.tokens = classes, tokens
        self.norm = TokenNorm(norms, channels, restore) if tokens else ClassNorm(norms, channels)

    def norms(self) -> list:
        return [] if self.tokens else [self.norm]

    def purify(self, rows: Tensor, label: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say what it does to rows")

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        if label is None and self.classes > 1:
            raise ValueError(f"{type(self).__name__} purifies under a class: call it with labels (N,) or (N, {self.classes})")
        z = z if self.tokens else z.permute(0, 2, 3, 1)  # channels last: a view, in the layout that nets have here
        label = torch.zeros(1, dtype=torch.long, device=z.device) if label is None or self.classes == 1 else label
        if self.by_image:
            label = label.repeat_interleave(len(z) // len(label), 0)
        out = self.purify(z.reshape(len(label), -1, self.channels), label).view(z.shape)
        return out if self.tokens else out.permute(0, 3, 1, 2)


class Linear(Rows):
    """NPD's polarizer on tokens: one linear map and one norm, whatever the label."""

    def __init__(self, channels: int, *, tokens: bool, restore: bool):
        super().__init__(channels, classes=1, tokens=tokens, restore=restore, norms=1)
        self.weight = nn.Parameter(torch.eye(channels))

    def purify(self, rows: Tensor, label: Tensor) -> Tensor:
        return self.norm(rows @ self.weight.T, label, rows)


class Replicated(Rows):
    """r-CNPD: a map and a norm of its own for each class."""

    def __init__(self, channels: int, *, classes: int, tokens: bool, restore: bool):
        super().__init__(channels, classes=classes, tokens=tokens, restore=restore, norms=classes)
        self.weight = nn.Parameter(torch.eye(channels).repeat(classes, 1, 1))

    def purify(self, rows: Tensor, label: Tensor) -> Tensor:
        return self.norm(rows @ pick(self.weight, label).transpose(1, 2), label, rows)

    def part(self, classes: Tensor) -> Replicated:
        """A copy with the polarizers of `classes` alone, which it calls 0, 1, …"""
        some = copy.deepcopy(self)
        some.classes = len(classes)
        for module, name, tensor in self.by_class():
            twin = some.get_submodule(module)
            if isinstance(tensor, nn.Parameter):
                setattr(twin, name, nn.Parameter(tensor.detach()[classes]))
            else:
                setattr(twin, name, tensor[classes])
        return some

    @torch.no_grad()
    def put(self, classes: Tensor, part: Replicated) -> None:
        """Take the polarizers of `classes` from `part`."""
        for module, name, tensor in self.by_class():
            tensor[classes.to(tensor.device)] = getattr(part.get_submodule(module), name).to(tensor.device)

    def by_class(self) -> list[tuple[str, str, Tensor]]:
        """(module, name, tensor) of everything whose first dimension is the class."""
        named = [*self.named_parameters(), *self.named_buffers()]
        return [(n.rpartition(".")[0], n.rpartition(".")[2], t) for n, t in named]


class Coded(Rows):
    """What e- and a-CNPD share: a code for each class, learned (K, size) or one-hot; one map, one norm."""

    by_image = True

    def __init__(self, channels: int, *, classes: int, tokens: bool, restore: bool, code: str, size: int):
        super().__init__(channels, classes=classes, tokens=tokens, restore=restore, norms=1)
        one_of("defense.code", code, ("learned", "onehot"))
        self.weight = nn.Parameter(torch.eye(channels))
        if code == "learned":
            self.code = nn.Parameter(0.02 * torch.randn(classes, size))
        else:
            self.register_buffer("code", torch.eye(classes))

    def shared(self, out: Tensor, rows: Tensor) -> Tensor:
        """The norm, which is one for all classes."""
        return self.norm(out, torch.zeros(len(rows), dtype=torch.long, device=rows.device), rows)


class Embedded(Coded):
    """e-CNPD: the class code is tiled over the map and concatenated to the features. Since one linear map follows, that
    is a shared projection and a bias for each class: W z + U e. fusion=film scales, too: (1 + S e) ⊙ W z + U e (ours)."""

    def __init__(self, channels: int, *, fusion: str, **common):
        super().__init__(channels, **common)
        one_of("defense.fusion", fusion, ("concat", "film"))
        self.shift = nn.Parameter(torch.zeros(channels, self.code.shape[1]))
        self.scale = nn.Parameter(torch.zeros(channels, self.code.shape[1])) if fusion == "film" else None

    def purify(self, rows: Tensor, label: Tensor) -> Tensor:
        out, code = rows @ self.weight.T, pick(self.code, label)
        if self.scale is not None:
            out = out * (1 + code @ self.scale.T)[:, None]
        return self.shared(out + (code @ self.shift.T)[:, None], rows)


class Attended(Coded):
    """a-CNPD: the class code weighs channels, a = 2 sigmoid(V e + v), or positions, by the softmax of keys of z against
    a query of e, scaled to mean 1; then one map: W (a ⊙ z). Which of the two the paper means, its abstract leaves open."""

    def __init__(self, channels: int, *, attention: str, **common):
        super().__init__(channels, **common)
        one_of("defense.attention", attention, ("channel", "spatial"))
        size = self.code.shape[1]
        self.attention = attention
        self.query = nn.Linear(size, channels if attention == "channel" else size, bias=attention == "channel")
        nn.init.zeros_(self.query.weight)
        if attention == "channel":
            nn.init.zeros_(self.query.bias)
        else:
            self.key = nn.Linear(channels, size, bias=False)

    def purify(self, rows: Tensor, label: Tensor) -> Tensor:
        query = self.query(pick(self.code, label))
        if self.attention == "channel":
            seen = rows * (2 * query.sigmoid())[:, None]
        else:
            score = (self.key(rows) @ query[:, :, None]) / query.shape[1] ** 0.5  # (N, positions, 1)
            seen = rows * score.softmax(1) * rows.shape[1]
        return self.shared(seen @ self.weight.T, rows)
