"""CNPD: a polarizer conditioned on the class that the backdoored net itself predicts, so that no target is guessed.

Source: Zhu et al., Class-Conditional Neural Polarizer, 2025, arXiv 2502.18520, of which only the abstract could be read.

A sample is first classified by the frozen net, c(x); then its features are purified under that label and classified
again. Training asks for what that must withstand: perturbations towards class k, purified under label k. Three forms
(bdx.conditioned): r replicates the polarizer per class, e embeds the class, a directs attention with it. Losses, budget
and schedule are NPD's; whatever the abstract leaves open is a switch, and its default our assumption (A1 to A13).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx import surgery
from bdx.adversarial import perturb
from bdx.conditioned import condition, label_of
from bdx.defenses.npd import IGNORE, NPD, runner_up
from bdx.errors import UserError, one_of

FORMS = {"r": "Replicated", "e": "Embedded", "a": "Attended"}


class CNPD(NPD):
    """form        r, e or a
    condition      the label at inference: predicted, oracle, wrong, random or none (A1, A.8); soft: as probabilities
    targets        classes to perturb towards: every, random (not y) or runner_up (A4)
    attacked       the net that is perturbed: defended, or frozen as it came (A2)
    adv_condition  the label under which a perturbed image is purified: its target, or predicted (A3)
    clean_condition  that of a clean image: home (the target's), predicted, or half and half (A5)
    at_once        how many of r's classes are trained in one batch, the others following independently; null: all on a GPU,
                   one on a CPU, where larger batches leave the caches. The result is the same. Where one class hangs on
                   the others (adv_condition=predicted, budget.stop), all are
    code, code_size, fusion, attention   of the forms e and a (A12, A13)
    """

    trains = "an inserted conditional polarizer alone"
    cost = "per clean image and epoch: NPD's passes, for r times the number of classes"

    def __init__(
        self, net: nn.Module, *, form: str, condition: str, soft: bool, targets: str, attacked: str, adv_condition: str,
        clean_condition: str, at_once: int | None, code: str, code_size: int, fusion: str, attention: str, target: int, **npd,
    ):  # fmt: skip
        one_of("defense.form", form, FORMS)
        one_of("defense.targets", targets, ("every", "random", "runner_up"))
        one_of("defense.attacked", attacked, ("defended", "frozen"))
        one_of("defense.adv_condition", adv_condition, ("target", "predicted"))
        one_of("defense.clean_condition", clean_condition, ("home", "predicted", "half"))
        if targets == "every" and clean_condition == "half":
            raise UserError("defense.clean_condition=half goes with targets=random or runner_up; with every, take home")
        if (at_once is not None and at_once < 1) or code_size < 1:
            raise UserError(f"defense.at_once={at_once}, code_size={code_size}: expected at least 1")
        if not 0 <= target < (k := net.spec["num_classes"]):
            raise UserError(f"defense.target={target}: expected 0 to {k - 1}, the class that oracle and wrong go by")
        if npd["wants"] == "all2all" and condition in ("oracle", "wrong"):
            raise UserError(
                f"defense.condition={condition}: an all2all attack sends each image to the class after its own, so that no one "
                "class is the target; take predicted, random or none"
            )
        together = adv_condition == "predicted" or npd["budget"].stop is not None
        if form == "r" and together and (at_once or k) < k:
            raise UserError(
                f"defense.at_once={at_once}: with adv_condition=predicted or budget.stop a class hangs on the others, so "
                f"that all are trained at once; take null, or {k}"
            )
        moving = bool(npd["warmup_epochs"]) or npd["bn_mode"] == "train"
        if form == "r" and soft and moving and (targets != "every" or adv_condition == "predicted"):
            raise UserError(
                "defense.soft=true: r's BatchNorm takes statistics class by class, for which a mixture of classes will not do; "
                "take targets=every and adv_condition=target, or warmup_epochs=0 and bn_mode=frozen"
            )
        self.how = {"source": condition, "soft": soft, "target": target, "classes": net.spec["num_classes"]}
        self.shape_of = {"form": form, "code": code, "size": code_size, "fusion": fusion, "attention": attention}
        self.targets, self.attacked, self.adv_condition = targets, attacked, adv_condition
        self.clean_condition, self.at_once = clean_condition, k if together else at_once
        if (npd["targeted"], npd["universal"], npd["structure"]) != (True, False, "conv_bn"):
            raise UserError("CNPD perturbs each image towards classes, with structure=conv_bn; npd has the other variants")
        super().__init__(net, target=None, **npd)
        self.classes = torch.arange(self.how["classes"])  # whose turn it is

    def polarizer_spec(self, structure: str, channels: int, tokens: bool) -> tuple[dict, dict | None]:
        how, of = condition(**self.how), self.shape_of
        classes = 1 if how["source"] == "none" else self.how["classes"]
        spec = {"_target_": f"bdx.conditioned.{FORMS[of['form']]}", "channels": channels, "classes": classes}
        extra = {"r": (), "e": ("code", "size", "fusion"), "a": ("code", "size", "attention")}[of["form"]]
        return spec | self.on_tokens(tokens) | {k: of[k] for k in extra}, how

    def tunes(self, stage: str) -> bool:
        return len(self.classes) == self.how["classes"] and super().tunes(stage)  # in a turn the net is not whole

    # the loop: r's classes are independent, so they may take turns

    def learn(self, batches, make_trainer: Callable) -> None:
        whole, gate = self.polarizer, self.net.get_submodule(self.at)
        at_once = self.at_once or (whole.classes if batches.split.x.is_cuda else 1)
        if self.shape_of["form"] != "r" or self.targets != "every" or whole.classes <= at_once:
            return super().learn(batches, make_trainer)
        for classes in torch.arange(whole.classes).split(at_once):
            self.classes = classes
            self.polarizer = gate.layer = whole.part(classes)
            batches.epoch = 0
            super().learn(batches, make_trainer)
            whole.put(classes, self.polarizer)
        self.polarizer = gate.layer = whole.eval()

    def training_step(self, batch, _):
        x, y, aim, label = self.cases(batch)
        x.requires_grad_(not self.warming)
        counts = torch.ones_like(y, dtype=torch.bool)
        with surgery.shared_prefix(self.net, self.at):
            home, counts = self.home(x, label, counts)
            logits = self.net(x, home)
            terms = self.reduce({"bn": F.cross_entropy(logits, y, reduction="none")}, counts)
            if not self.warming:
                same = home is label and self.attacked == "defended"
                first = x, logits if same else self.victim(x, label)
        if not self.warming:
            with surgery.unmoved(self.polarizer.norms()):
                terms |= self.robust(x, y, aim, label, logits, first)
        return {"loss": sum(self.weights[k] * v for k, v in terms.items()), **terms}

    def cases(self, batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x, y, aim, label): images; the class of each; the class it is perturbed towards, IGNORE where that is its own;
        the polarizer's label for that, one for each image or, with every class in turn, for each copy of the batch."""
        x, y = batch.x, batch.y
        if self.targets == "every":
            k, turn = self.classes.to(y.device), len(self.classes)
            x, y, aim = x.repeat(turn, 1, 1, 1), y.repeat(turn), k.repeat_interleave(len(y))
            return x, y, torch.where(aim == y, IGNORE, aim), torch.arange(turn, device=y.device)
        if self.targets == "random":
            aim = (y + torch.randint(1, self.how["classes"], y.shape, device=y.device)) % self.how["classes"]
        else:
            with torch.no_grad():
                aim = runner_up(self.net(x, self.seen(x)), y)
        return x, y, aim, aim

    def seen(self, x: Tensor) -> Tensor:
        """The label that training purifies under where it takes the predicted one, whatever `condition` is at inference: that
        may be the attack's target, of which no defense knows."""
        if self.how["source"] in ("predicted", "none"):
            return self.net.condition(x)
        return label_of({"source": "predicted", "soft": False}, self.net.raw(x).detach())

    def home(self, x: Tensor, label: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(the label that clean images are purified under, which of them count)"""
        if self.clean_condition == "home":
            return label, counts
        seen = self.seen(x)
        if self.targets == "every":  # each copy of the batch counts where the net predicts its class
            hard = seen if seen.ndim == 1 else seen.argmax(1)
            return label, self.classes.to(hard.device).repeat_interleave(len(x) // len(label)) == hard
        if self.clean_condition == "predicted":
            return seen, counts
        random = torch.randint(self.how["classes"], (len(x),), device=x.device)
        random = random if seen.ndim == 1 else F.one_hot(random, self.how["classes"]).to(seen.dtype)
        return torch.cat([seen[: len(x) // 2], random[len(x) // 2 :]]), counts

    def victim(self, x: Tensor, label: Tensor) -> Tensor:
        """Logits of the net that the inner problem perturbs."""
        return self.net.raw(x) if self.attacked == "frozen" else self.net(x, label)

    def robust(self, x, y, aim, label, logits, first) -> dict[str, Tensor]:
        """The terms at x+δ; logits: those of the clean term."""
        net = partial(self.victim, label=label)
        worst = perturb(net, x.detach(), aim, self.budget, targeted=True, first=first)
        adv = self.net(worst, label if self.adv_condition == "target" else self.seen(worst))
        return self.reduce(self.terms(adv.float(), y, aim, logits.detach()), aim != IGNORE)

    def reduce(self, terms: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
        """Means over the images that count; with every class in turn, summed over the classes where each has weights of
        its own (r), averaged where they share them."""
        if self.targets != "every":
            return super().reduce(terms, counts)
        counts = counts.view(len(self.classes), -1)
        means = {k: (v.view_as(counts) * counts).sum(1) / counts.sum(1).clamp_min(1) for k, v in terms.items()}
        alone = self.shape_of["form"] == "r" and self.how["source"] != "none"
        return {k: v.sum() if alone else v.mean() for k, v in means.items()}
