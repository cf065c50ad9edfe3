"""Attack: how a training set is poisoned, how the victim is trained, what the trigger looks like at test time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bdx.adversarial import hardened
from bdx.datasets.base import Augment, Batches, ImageData
from bdx.errors import UserError, one_of
from bdx.picture import picture
from bdx.sharpness import sharpness_aware
from bdx.split import Split, images_of, pixels
from bdx.training import Recipe, blamed, optimizers

POISONING = 5_555_557  # at seed 0 the victim's first epoch would draw the same order, and see all poisoned images first


class Attack(pl.LightningModule):
    """Ordinary training on a poisoned set by default; a method overrides as little as its paper changes.

    net             Classifier, pixels in [0,1] -> logits; trained in place
    shape           (C, H, W) of the images
    target          the class that triggered images shall get
    labels          all2one (target) or all2all (y + 1 modulo K)
    ratio           how many images are poisoned, as a share of `ratio_of`: train (the whole set) or candidates
    select          random or first, among the candidates
    include_target  whether images of the target class may be poisoned (the field's habit, and NPD's: true)
    recipe          how the victim is trained
    seed            draws the poisoned images and made patterns

    Class attributes declare: clean_label (images of the target class only, labels kept), leaves_poison (False: the
    attacker controls training, no poisoned set exists), has_trigger (False for attack=none), sample_specific (what the
    trigger does to a pixel depends on other pixels, or not linearly on its value), trigger_from (formula; made before
    poisoning; or trained with the victim), hardens (a training_step of its own goes through `loss`), trained_here (False:
    the net came from elsewhere, and what it was trained on is not known).
    """

    clean_label = False
    leaves_poison = True
    has_trigger = True
    sample_specific = False
    trigger_from = "formula"
    hardens = False
    trained_here = True

    def __init__(
        self, net: nn.Module, *, shape: tuple[int, int, int], num_classes: int, recipe: Recipe, seed: int,
        target: int, labels: str, ratio: float, ratio_of: str, select: str, include_target: bool,
    ):  # fmt: skip
        super().__init__()
        self.net, self.shape, self.num_classes, self.recipe, self.seed = net, shape, num_classes, recipe, seed
        self.target, self.labels, self.ratio, self.ratio_of = target, labels, ratio, ratio_of
        self.select, self.include_target = select, include_target
        if not 0 <= target < num_classes:
            raise UserError(f"attack.target={target}: expected 0 to {num_classes - 1} for {num_classes} classes")
        one_of("attack.labels", labels, ("all2one", "all2all"))
        one_of("attack.ratio_of", ratio_of, ("train", "candidates"))
        one_of("attack.select", select, ("random", "first"))
        if self.clean_label and labels == "all2all":
            raise UserError(
                f"{type(self).__name__} is a clean-label attack: it keeps the labels of one class and cannot be "
                "all2all; set attack.labels=all2one or take a dirty-label attack"
            )

    # what an attack is: the hooks of a method

    def trigger(self, x: Tensor) -> Tensor:
        """x (N,C,H,W) float in [0,1] -> the same with the trigger."""
        raise NotImplementedError(f"{type(self).__name__} must say what its trigger does")

    def training_trigger(self, x: Tensor, index: Tensor) -> Tensor:
        """What the poisoned training images x (N,C,H,W) get, which stand at `index` (N,) in the training set: the same as
        at test time, unless a method poisons in its own way."""
        return self.trigger(x)

    def relabel(self, y: Tensor) -> Tensor:
        """The class that a triggered image of true class y (N,) shall get."""
        return (y + 1) % self.num_classes if self.labels == "all2all" else torch.full_like(y, self.target)

    def candidates(self, y: Tensor) -> Tensor:
        """(N,) bool: which training images of true class y may be poisoned."""
        if self.clean_label:
            return y == self.target
        if self.include_target or self.labels == "all2all":
            return torch.ones_like(y, dtype=torch.bool)
        return y != self.target

    def training_step(self, batch, _):
        return self.loss(batch.x, batch.y)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The victim's cross entropy, on adversarial images where train.adversarial asks for them."""
        x = hardened(self.net, x, y, self.recipe.budget)
        return F.cross_entropy(self.net(x), y, label_smoothing=self.recipe.label_smoothing)

    # pictures for triggers

    def scaled(self, picture: Tensor) -> Tensor:
        """(3,h,w) -> the images' own shape: channels averaged where there is one, pixels repeated or left out."""
        picture = picture if self.shape[0] == 3 else picture.mean(0, keepdim=True)
        return F.interpolate(picture[None], self.shape[1:], mode="nearest")[0]

    def read(self, file: str) -> Tensor:
        """A picture or array of the user's, resized smoothly, as (C,H,W) in [0,1]."""
        return self.scaled(picture(file, self.shape[1:]))

    # what follows from it

    def check(self, split: Split) -> None:
        """Raise UserError where this training set cannot be poisoned or trained on as asked, before anything is made."""
        self.recipe.check_steps(len(split))
        if self.has_trigger and self.trigger_from == "formula":
            images_of(self.trigger(x := pixels(split.x[:8])), x, f"{type(self).__name__}.trigger")
        if self.leaves_poison:
            self.choose(split)

    @torch.no_grad()
    def stamp(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """uint8 -> triggered uint8: training and test see the same, quantised pixels. index: of training images. Rounded to
        the nearest grey level, where the released codes cut off what is behind the point and are up to one level darker."""
        how, given = (self.trigger, [x]) if index is None else (self.training_trigger, [x, index])
        chunks = zip(*(g.split(4096) for g in given), strict=True)
        parts = [(how(p.float() / 255, *at) * 255).round().clamp(0, 255).to(torch.uint8) for p, *at in chunks]
        return torch.cat(parts) if parts else x

    def choose(self, split: Split) -> Tensor:
        """Indices (k,), sorted, of the images to poison. Raises UserError where there are fewer than asked for."""
        may = self.candidates(split.y_true).cpu()
        of = len(split) if self.ratio_of == "train" else int(may.sum())
        may = (may & ~split.poisoned.cpu()).nonzero().flatten()  # another trigger may have been there first (multi)
        k = round(self.ratio * of)
        if not 0 < k <= len(may):
            which = f"of class {self.target}" if self.clean_label else "that may be poisoned"
            raise UserError(
                f"attack.ratio={self.ratio} asks for {k} poisoned images of {of}, but there are {len(may)} {which}; "
                f"expected attack.ratio between {1 / of:.2g} and {len(may) / of:.4g}"
                + ("" if self.ratio_of == "candidates" else ", or attack.ratio_of=candidates for a share of those")
            )
        if self.select == "random":
            seed = self.seed or (0 if self.clean_label else POISONING)
            may = may[torch.randperm(len(may), generator=Generator().manual_seed(seed))]
        return may[:k].sort().values.to(split.x.device)

    def poison(self, split: Split) -> Split:
        """The attacker's training set; the split as it is where the attacker controls training instead."""
        if not self.leaves_poison:
            return split
        chosen = self.choose(split)
        x, y, poisoned = split.x.clone(), split.y.clone(), split.poisoned.clone()
        x[chosen] = self.stamp(split.x[chosen], chosen)
        if torch.equal(x[chosen], split.x[chosen]):
            size = "×".join(map(str, self.shape[1:]))
            raise UserError(f"{type(self).__name__} with these settings changes no pixel of the {len(chosen)} images of {size}")
        poisoned[chosen] = True
        if not self.clean_label:
            y[chosen] = self.relabel(split.y_true[chosen])
        return replace(split, x=x, y=y, poisoned=poisoned)

    def triggered(self, split: Split) -> Split:
        """The ASR test set: triggered images, only of classes that `relabel` would change; y is the wanted class."""
        some = split[self.relabel(split.y_true) != split.y_true]
        return replace(some, x=self.stamp(some.x), y=self.relabel(some.y_true), poisoned=torch.ones_like(some.poisoned))

    def by_trigger(self, split: Split) -> dict[str, Split]:
        """The ASR test set of each trigger by its name, where there are several; `triggered` is all of them."""
        return {}

    # how the victim is trained

    def batches(self, data: ImageData) -> Batches:
        r = self.recipe
        how = {"augment": Augment(**r.augment), "drop_last": r.drop_last}
        return data.batches(data.train, size=r.batch, shuffle=True, **how)

    def configure_optimizers(self):
        r = self.recipe
        steps = self.trainer.estimated_stepping_batches
        with blamed(f"train.schedule over {steps} steps"):  # where `check` counted other batches than a method makes
            return optimizers(self.net.parameters(), r.optimizer, r.schedule, r.every, steps)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        r = self.recipe
        if r.sam_rho:
            optimizer_closure = sharpness_aware(self.net, optimizer_closure, r.sam_rho, r.sam_adaptive)
        optimizer.step(closure=optimizer_closure)

    def fit(self, data: ImageData, make_trainer: Callable, checkpoint=None) -> None:
        """Train the victim, going on from `checkpoint` if a killed run has left one."""
        trainer = make_trainer("backdoor", self.recipe.epochs, checkpoint=checkpoint)
        go_on = checkpoint if checkpoint is not None and checkpoint.exists() else None
        if self.recipe.compile:
            self.net.compile()
        trainer.fit(self.train(), self.batches(data), ckpt_path=go_on, weights_only=True)
        self.net._compiled_call_impl = None
