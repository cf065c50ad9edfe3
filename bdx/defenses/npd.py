"""NPD: a linear layer inside the frozen net learns to filter what targeted perturbations change, and with it triggers.

Source: Zhu et al., Neural Polarizer, NeurIPS 2023, arXiv 2306.16697; sec. 3 and Tables 3, 4, 13, 15.

Upper problem, over the polarizer θ:  λ_bn CE(f_θ(x), y) + λ_ce CE(f_θ(x+δ), y)
                                      + λ_margin (−log(1 − max_{k≠y} s_k)) + λ_asr (−log(1 − s_{y'})),  s at x+δ
Lower problem, per image:             δ = argmin CE(f_θ(x+δ), y') within ‖δ‖ ≤ ρ, by PGD on the defended net

NPD guesses y' for each image as the runner-up class of f_θ(x). NPD-TP knows the target, NPD-TU knows it and shares one δ
per batch, NPD-UP and NPD-UU push away from y instead. recipe=code follows the released code where it differs: its first
adversarial term asks for the net's own prediction on x in place of y, and its logarithms are of 1.0001 − s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx import places, surgery
from bdx.adversarial import Budget, perturb
from bdx.build import instantiate
from bdx.datasets.base import ImageData
from bdx.defenses.base import Tuning
from bdx.errors import UserError, one_of
from bdx.polarizers import STRUCTURES

IGNORE = -100  # cross_entropy's own mark of a sample that does not count


class NPD(Tuning):
    """layer      where the polarizer goes: a module's name, or one of shallow, middle, third_to_last, penultimate, last, whole
    structure     conv_bn, conv, conv_bn_x2, linear, linear_light, osad or osdn (bdx.polarizers)
    init          neutral (γ = 1, β = 0 around the features' own moments, so that the first forward is the net's), identity
                  (the same start with the moments in γ and β, which then take far larger steps) or plain (γ = 1, β = 0)
    bn_mode       of the polarizer's BatchNorm after warm-up: frozen or train
    warmup_epochs, warmup_lr   plain SGD on clean images alone, BatchNorm in train mode
    budget        the perturbation's norm, radius and steps
    targeted, universal, target    the variant; target=null guesses it per image
    wants         what a known target means: all2one (that class), or all2all (of each image the class after its own)
    recipe        paper or code
    lambda_*      weights of the four terms; 0 leaves a term out (Table 3)
    """

    trains = "an inserted polarizer alone"
    cost = "per clean image and epoch: the perturbation's passes and two more, through frozen weights"
    takes_mixed = False

    def __init__(
        self, net: nn.Module, *, layer: str, structure: str, init: str, bn_mode: str, warmup_epochs: int,
        warmup_lr: float, budget: Budget, targeted: bool, universal: bool, target: int | None, wants: str,
        recipe: str, lambda_bn: float, lambda_ce: float, lambda_margin: float, lambda_asr: float, **loop,
    ):  # fmt: skip
        one_of("defense.structure", structure, STRUCTURES)
        one_of("defense.init", init, ("neutral", "identity", "plain"))
        one_of("defense.bn_mode", bn_mode, ("frozen", "train"))
        one_of("defense.recipe", recipe, ("paper", "code"))
        one_of("defense.wants", wants, ("all2one", "all2all"))
        weights = {"lambda_bn": lambda_bn, "lambda_ce": lambda_ce, "lambda_margin": lambda_margin, "lambda_asr": lambda_asr}
        for key, value in {"warmup_epochs": warmup_epochs, "warmup_lr": warmup_lr, **weights}.items():
            if value < 0:
                raise UserError(f"defense.{key}={value}: expected 0 or more")
        if target is not None and not 0 <= target < (k := net.spec["num_classes"]):
            raise UserError(f"defense.target={target}: expected 0 to {k - 1}, or null to guess it for each image")
        super().__init__(surgery.freeze(net), **loop)
        self.init, self.bn_mode, self.warmup_epochs, self.warmup_lr = init, bn_mode, warmup_epochs, warmup_lr
        self.budget, self.targeted, self.universal, self.target = budget, targeted, universal, target
        self.wants, self.recipe, self.warming = wants, recipe, False
        self.weights = {key.removeprefix("lambda_"): value for key, value in weights.items()}
        self.at = self.insert(layer, structure)

    def insert(self, layer: str, structure: str) -> str:
        """Put the polarizer in front of `layer`; returns that module's name inside the net."""
        sample = self.net.sample()
        at = places.locate(self.net, layer, sample)
        shape = places.input_shape(self.net, at, sample)
        tokens = places.tokens_at(self.net.get_submodule(at), shape)
        if not tokens and len(shape) != 3:
            raise UserError(f"defense.layer={layer}: its input has shape {shape}; a polarizer needs a map (C, H, W) or tokens")
        spec, condition = self.polarizer_spec(structure, shape[-1] if tokens else shape[0], tokens)
        spec |= {"size": list(shape[1:])} if structure == "linear" else {}
        self.polarizer = instantiate(spec, allowed=("bdx.polarizers.", "bdx.conditioned."))
        self.net.insert(at, self.polarizer, spec, condition)
        return at

    def polarizer_spec(self, structure: str, channels: int, tokens: bool) -> tuple[dict, dict | None]:
        """(what the polarizer is built from, where its label comes from: nowhere)"""
        if not tokens:
            return {"_target_": f"bdx.polarizers.{STRUCTURES[structure].__name__}", "channels": channels}, None
        if structure != "conv_bn":
            raise UserError(f"defense.structure={structure}: on tokens there is conv_bn alone, as Linear and LayerNorm")
        return {"_target_": "bdx.conditioned.Linear", "channels": channels, **self.on_tokens(tokens)}, None

    def on_tokens(self, tokens: bool) -> dict:
        return {"tokens": tokens, "restore": self.init != "plain"}

    # the loop

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        with self.start(data):
            self.learn(self.batches(data), make_trainer)
        return self.net

    def start(self, data: ImageData):
        """A context to learn in, from the start that `init` names."""
        if self.init == "plain" or not self.polarizer.norms():
            return nullcontext()
        once = data.batches(data.clean, size=self.batch, shuffle=False, augment=False)
        moments = surgery.moments(self.net, self.at, once)
        if self.init == "neutral":
            return self.polarizer.neutral(*moments)
        self.polarizer.calibrate(*moments)
        return nullcontext()

    def learn(self, batches, make_trainer: Callable) -> None:
        """Warm-up, then the two problems, whose first epochs see the warm-up's batches again."""
        if self.warmup_epochs:
            self.warming = True
            self.polarizer.train()
            make_trainer("warm-up", self.warmup_epochs).fit(self, batches)
            self.warming = False
        self.polarizer.train(self.bn_mode == "train")
        make_trainer(type(self).__name__, self.epochs).fit(self, batches)

    def trained(self):
        return self.polarizer.parameters()

    def configure_optimizers(self):
        if self.warming:
            return torch.optim.SGD(self.trained(), lr=self.warmup_lr)
        return super().configure_optimizers()

    def backward(self, loss: Tensor) -> None:
        loss.backward(inputs=list(self.polarizer.parameters()))  # and not into the pixels, whose gradient is spent

    def training_step(self, batch, _):
        x, y = batch.x.requires_grad_(not self.warming), batch.y
        logits = self.net(x)
        terms = {"bn": F.cross_entropy(logits, y)}
        if not self.warming:
            with surgery.unmoved(self.polarizer.norms()):  # perturbed images leave no trace in BatchNorm
                worst = self.worst_case(x, y, logits)
                terms |= self.robust_terms(self.net(worst).float(), y, logits.detach())
        return {"loss": sum(self.weights[k] * v for k, v in terms.items()), **terms}

    # the two problems

    def towards(self, y: Tensor, logits: Tensor) -> Tensor:
        """(N,) the class that each perturbation aims at, or away from; IGNORE where an image is of that class itself."""
        if not self.targeted:
            return y
        if self.target is None:
            return runner_up(logits.detach(), y)
        if self.wants == "all2all":
            return (y + 1) % self.net.spec["num_classes"]
        return torch.where(y == self.target, IGNORE, self.target)

    def worst_case(self, x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        """x + δ; the clean pass that gave `logits` is the search's first step."""
        label = self.towards(y, logits)
        how = {"targeted": self.targeted, "universal": self.universal}
        return perturb(self.net, x.detach(), label, self.budget, first=(x, logits), **how)

    def robust_terms(self, adv: Tensor, y: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """adv: logits (N,K) at x+δ; logits: at x. Means over the images that were attacked."""
        attacked = runner_up(adv.detach(), y) if not self.targeted else self.towards(y, logits)
        return self.reduce(self.terms(adv, y, attacked, logits), attacked != IGNORE)

    def terms(self, adv: Tensor, y: Tensor, attacked: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """(N,) each: the three terms at x+δ, image by image."""
        right = y if self.recipe == "paper" else logits.argmax(1)
        return {
            "ce": F.cross_entropy(adv, right, reduction="none"),
            "margin": -self.log_without(adv, runner_up(adv.detach(), y)),
            "asr": -self.log_without(adv, attacked.clamp_min(0)),
        }

    def reduce(self, terms: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
        """Means over the images (N,) bool that count; 0 where none does."""
        return {k: (v * counts).sum() / counts.sum().clamp_min(1) for k, v in terms.items()}

    def log_without(self, logits: Tensor, k: Tensor) -> Tensor:
        """log(1 − s_k) per image: exact by log-sum-exp, or as the code has it."""
        if self.recipe == "code":
            return (1.0001 - logits.softmax(1).gather(1, k[:, None])[:, 0]).log()
        others = logits.scatter(1, k[:, None], float("-inf"))
        return others.logsumexp(1) - logits.logsumexp(1)


def runner_up(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) the most likely class other than y."""
    return logits.scatter(1, y[:, None], float("-inf")).argmax(1)
