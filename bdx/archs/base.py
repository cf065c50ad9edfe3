"""Classifier: normalisation and a body; saved with a JSON from which `bdx.load` builds it again in two lines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bdx import surgery
from bdx.build import instantiate
from bdx.conditioned import label_of
from bdx.errors import UserError
from bdx.store import file_sha256, provenance, save_folder, unaltered

FORMAT = "bdx-net-1"
ALLOWED = ("bdx.archs.", "bdx.polarizers.", "bdx.conditioned.", "torchvision.models.", "timm.create_model")

FETCHING = ("weights", "weights_backbone", "pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


class Normalize(nn.Module):
    """(x − mean) / std per channel, for x in [0,1]."""

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """Pixels in [0,1] (N,C,H,W) -> logits (N,K). `spec` is what it is built from.

    Where a layer is inserted that looks at a class (`gate` is its name), a pass without `label` asks the net as it was
    for one first; what runs before that layer runs once for both (CNPD).
    """

    def __init__(self, normalize: Normalize, body: nn.Module, spec: dict):
        super().__init__()
        self.normalize, self.body, self.spec = normalize, body, spec
        self.gate: str | None = None

    def insert(self, at: str, layer: nn.Module, spec: dict, condition: dict | None = None) -> None:
        """Put `layer` in front of the module named `at`; see surgery.Inserted."""
        surgery.insert(self, at, layer, spec, condition)
        self.gate = at if condition else self.gate

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"pixels are floats in [0,1], and not {x.dtype}: x.float() / 255")
        if self.gate is None:
            return self.body(self.normalize(x))
        if label is not None:
            with surgery.given(self.get_submodule(self.gate), label):
                return self.body(self.normalize(x))
        with surgery.shared_prefix(self, self.gate):
            return self(x, self.condition(x))

    def sample(self, n: int = 2) -> Tensor:
        """(n,C,H,W) black images where the net is, to ask it for shapes and places."""
        return torch.zeros(n, *self.spec["shape"], device=self.normalize.mean.device)

    def raw(self, x: Tensor) -> Tensor:
        """Logits of the net as if nothing were inserted."""
        with surgery.given(self.get_submodule(self.gate), None, active=False):
            return self.body(self.normalize(x))

    def condition(self, x: Tensor) -> Tensor:
        """The label that the inserted layer gets for x; the raw pass is spared where it does not depend on x."""
        how = self.get_submodule(self.gate).condition
        if how["source"] == "predicted":
            return label_of(how, self.raw(x).detach())
        return label_of(how, x.new_empty(len(x), self.spec["num_classes"]))


def build(arch: dict, *, num_classes: int, mean: list[float], std: list[float], shape: tuple[int, int, int]) -> Classifier:
    """arch: a config of conf/arch. Tries one forward pass on `shape` (C,H,W): a net that cannot take it says so now."""
    if not all(0 <= m <= 1 for m in mean) or not all(0 < s <= 1 for s in std):
        raise UserError(
            f"dataset.normalize.mean={mean}, std={std}: pixels are in [0,1]; expected means from 0 to 1, and deviations above "
            "0 and at most 1; divide values made for 0 to 255 by 255"
        )
    spec = {"arch": arch, "num_classes": num_classes, "mean": mean, "std": std, "shape": list(shape)}
    try:
        body = instantiate(arch, allowed=ALLOWED, num_classes=num_classes)
    except (UserError, ValueError, RuntimeError, TypeError, AssertionError) as e:  # or a library's own words
        said = (str(e) or type(e).__name__).splitlines()[0]
        key = re.search(r"unexpected keyword argument '(\w+)'", said)
        hint = f"; it takes no {key[1]}, which a preset may set for another net: add ~arch.{key[1]}" if key else ""
        about = "" if isinstance(e, UserError) else f"cannot build {arch['_target_']}: "
        raise UserError(f"{about}{said}{hint}") from None
    net = Classifier(Normalize(mean, std), body, spec).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad(), surgery.mode(net, False):
            out = net(net.sample())
        shape_out = tuple(getattr(out, "shape", ()))
        if shape_out != (2, num_classes):
            raise ValueError(f"its output for 2 images has shape {shape_out} instead of (2, {num_classes})")
    except (RuntimeError, ValueError, AssertionError) as e:
        said = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{arch['_target_']} cannot classify images of {shape}: {said}") from None
    return net


def fresh(net: Classifier) -> Classifier:
    """A net just built as `net` was, with weights of its own and nothing inserted, on the CPU."""
    spec = {k: v for k, v in net.spec.items() if k != "arch"}
    return build(net.spec["arch"], **spec | {"shape": tuple(spec["shape"])})


def save(net: Classifier, folder: Path, **facts) -> None:
    """Write net.safetensors and net.json (architecture, insertions, checksum, versions, `facts`) into `folder`."""
    if not isinstance(net, Classifier):
        raise UserError(f"a {type(net).__name__} is no repaired net: a defense returns the one it was given, or one built so")
    meta = {"format": FORMAT, **net.spec, "insertions": surgery.insertions(net), "versions": provenance(), **facts}
    save_folder(folder, net.state_dict(), meta, weights="net.safetensors", sheet="net.json")


def sheet(folder: Path) -> dict:
    """net.json, once it is known to be whole and to belong to the weights beside it."""
    try:
        meta = json.loads((folder / "net.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no net.json: expected a folder that a run has written (nets/<id>)") from None
    except ValueError as e:
        raise UserError(f"{folder}/net.json is not JSON ({e})") from None
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise UserError(f"{folder}/net.json: format={found!r}, expected {FORMAT!r}")
    if missing := {"arch", "num_classes", "mean", "std", "shape", "insertions", "sha256"} - set(meta):
        raise UserError(f"{folder}/net.json lacks {', '.join(sorted(missing))}")
    if any(fetches(node) for node in (meta["arch"], *meta["arch"].values()) if isinstance(node, dict)):
        raise UserError(f"{folder}/net.json asks a library to fetch weights ({meta['arch']}); a saved net brings its own")
    if not unaltered(meta):
        raise UserError(f"{folder}/net.json does not match its own checksum: altered, make it again")
    weights = folder / "net.safetensors"
    if not weights.is_file() or meta["sha256"] != file_sha256(weights):
        raise UserError(f"{weights} is missing or does not match its checksum: truncated or altered, make it again")
    return meta


def fetches(arch: dict) -> bool:
    """Whether an architecture's arguments make a library load weights from elsewhere."""
    return any(v not in (None, False) for k, v in arch.items() if k in FETCHING) or ":" in str(arch.get("model_name", ""))


def load(folder: Path | str) -> Classifier:
    """The net in `folder`, in eval mode on the CPU. Keys and shapes must match exactly, the checksum too."""
    folder = Path(folder)
    meta = sheet(folder)
    net = build(meta["arch"], num_classes=meta["num_classes"], mean=meta["mean"], std=meta["std"], shape=tuple(meta["shape"]))
    for edit in meta["insertions"]:
        net.insert(edit["at"], instantiate(edit["layer"], allowed=ALLOWED), edit["layer"], edit.get("condition"))
    net.load_state_dict(load_file(folder / "net.safetensors"))
    return net.eval()
