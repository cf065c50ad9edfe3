"""Stored: what a run left behind, opened again: its row, both nets, its attack and its images."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from bdx import recipe, results
from bdx.archs import base as archs
from bdx.attacks.base import Attack
from bdx.build import instantiate
from bdx.configure import compose, show
from bdx.datasets import base as datasets
from bdx.datasets.base import ImageData
from bdx.errors import UserError
from bdx.store import SEAL, Artifact, Store, file_sha256, unaltered


class Stored:
    """The run `id`, from the folders that `overrides` name (paths.out=…); each part is read when it is first asked for, on
    the CPU.

    The attack is built from the recipe beside the backdoored weights. A recipe knows a user's own `file` and images by
    their hash alone: attack.file=… and dataset.source.root=… among the overrides say where they lie now. Raises
    UserError, naming the file, for whatever is missing or not what the run used.
    """

    def __init__(self, id: str | None, overrides: list[str]):
        self.id, self.overrides = id, overrides
        found = compose([o for o in overrides if o.startswith("paths.")]).paths
        self.paths = {k: Path(v).expanduser() for k, v in found.items()}
        self.results = self.paths["results"]

    @cached_property
    def row(self) -> dict:
        if found := self.id and results.find(self.results, self.id):
            return found
        have = sorted(results.rows(self.results), key=lambda row: row["finished"], reverse=True)
        more = f" and {len(have) - 8} more" if len(have) > 8 else ""
        named = ", ".join(row["id"] for row in have[:8]) or "none"
        raise UserError(f"{self.id or 'no RUN_ID'}: no such run in {self.results}; there are, newest first, {named}{more}")

    @property
    def siblings(self) -> list[dict]:
        """The rows of the same backdoored net."""
        rows = (results.find(self.results, p.stem) for p in sorted(self.results.glob("*.json")))
        return [row for row in rows if row and row["backdoor"] == self.row["backdoor"]]

    @cached_property
    def cfg(self) -> dict:
        """Its data set, the defaults of its attack, with NPD's values for what a figure needs of them, and `overrides`."""
        names = [f"{group}={self.row[group]}" for group in ("dataset", "attack")]
        own = [f"{k}={show(v)}" for k, v in self.row.items() if k.startswith("dataset.")]
        cfg = compose([*names, "defense=npd", *own, *self.overrides])
        return OmegaConf.to_container(cfg, resolve=True)

    @cached_property
    def backdoor(self) -> Artifact:
        found = Store(self.paths["store"]).find(self.row["backdoor"])
        if found is None:
            raise UserError(f"{self.paths['store'] / self.row['backdoor']} is missing or altered: run the cell again")
        return found

    @cached_property
    def data(self) -> ImageData:
        """The run's images, before any was poisoned; `clean` are those that it reserved."""
        data = datasets.load(self.cfg["dataset"], self.paths["data"], device="cpu", seed=self.row["seed"])
        if data.sha256 != (wanted := self.row["data_sha256"]):
            raise UserError(f"{self.id} was run on other images (sha256 {wanted[:12]}) than these (sha256 {data.sha256[:12]})")
        if self.cfg["dataset"]["reserved"]["generated"]:
            return data
        reserved = torch.tensor(archs.sheet(self.folder)["reserved"])
        return replace(data, clean=data.train[reserved], reserved=reserved)

    @cached_property
    def attack(self) -> Attack:
        """With the backdoored net in it, in eval mode."""
        how = self.backdoor.meta["recipe"]
        about = {"num_classes": self.data.num_classes, "shape": self.data.shape}
        net = archs.build(how["arch"], **how["dataset"]["normalize"], **about)
        since = {k: v for k, v in recipe.SINCE.items() if k in self.cfg["attack"]}
        attack = since | how["attack"] | self.file(how["attack"])
        train = how["train"] | {"augment": {"zoom": recipe.SINCE["zoom"]} | how["train"]["augment"]}
        attack = instantiate(attack, net=net, recipe=instantiate(train), seed=how["seed"], **about)
        attack.load_state_dict({k: v for k, v in self.backdoor.tensors.items() if not k.startswith("split.")})
        return attack.eval()

    def file(self, attack: dict) -> dict:
        """{"file": path} where the recipe names one by its hash."""
        if attack.get("file") is None:
            return {}
        given = {"file": self.cfg["attack"]["file"]}
        if recipe.canonical(given)["file"] != attack["file"]:
            raise UserError(
                f"attack.file={given['file']}: {self.id} used the file with {attack['file'][:19]}…; say where it is"
            )
        return given

    @property
    def before(self) -> archs.Classifier:
        return self.attack.net

    @cached_property
    def after(self) -> archs.Classifier:
        return archs.load(self.folder)

    def extra(self, name: str) -> nn.Module:
        """What the defense has left besides the net, such as Trap-and-Replace's decoder."""
        folder = self.paths["nets"] / f"{self.row['id']}.log" / name
        try:
            spec = json.loads((folder / "spec.json").read_text())
        except (OSError, ValueError):
            raise UserError(f"{folder}: {self.row['defense']} has left no {name} there; take a run of tnr") from None
        weights = folder / "weights.safetensors"
        if not unaltered(spec) or spec.pop("sha256") != file_sha256(weights):
            raise UserError(f"{folder} does not match its checksums: truncated or altered, run the cell again")
        module = instantiate({k: v for k, v in spec.items() if k != SEAL}, allowed=("bdx.decoder.",))
        module.load_state_dict(load_file(weights))
        return module.eval()

    @property
    def folder(self) -> Path:
        return self.paths["nets"] / self.row["id"]

    @property
    def repaired(self) -> dict[str, archs.Classifier]:
        return {self.row["defense"]: self.after}

    @property
    def nets(self) -> dict[str, archs.Classifier]:
        return {self.row["attack"]: self.before} | self.repaired


class Several(Stored):
    """Several runs of one backdoored net, each with a defense of its own: what the first left, and the nets of all."""

    def __init__(self, ids: list[str], overrides: list[str]):
        super().__init__(ids[0], overrides)
        self.runs = [Stored(id, overrides) for id in ids]

    @property
    def siblings(self) -> list[dict]:
        return [run.row for run in self.runs]

    @property
    def repaired(self) -> dict[str, archs.Classifier]:
        return {run.row["defense"]: run.after for run in self.runs if run.row["defense"] != "none"}
