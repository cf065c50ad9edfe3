"""features: what the classifier sees of clean and of triggered images, in two dimensions.

Source: Wei et al., Distance-Driven Detoxification, ICCV 2025, arXiv 2411.09585, Fig. 4a; Wang et al., Trap and Replace,
NeurIPS 2022, arXiv 2210.06428, Fig. 2. t-SNE: van der Maaten & Hinton 2008.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from torch import Generator, Tensor, nn

from bdx import places
from bdx.archs.base import Classifier
from bdx.attacks.base import Attack
from bdx.errors import UserError, one_of
from bdx.figures.base import check_trigger, grid, keep, named, watched
from bdx.split import Split, pixels


def features(
    nets: dict[str, Classifier],
    attack: Attack,
    test: Split,
    path: Path | str,
    *,
    method: str = "tsne",
    count: int = 500,
    seed: int = 0,
    classes: tuple[str, ...] | None = None,
) -> pd.DataFrame:
    """Two dimensions of the features of `count` test images, drawn by `seed`, and of the same with the trigger.

    nets: what to call it -> net; each is embedded by itself, clean and triggered images together. A feature is the input
    of the classifier's last Linear, flattened. Triggered are only images whose label the attack would change.
    method: tsne or pca. Columns: net · image (index in `test`) · triggered · label (true class, "3: cat" where
    `classes` gives names) · wanted (class the trigger asks for; the true one for a clean image) · predicted · x, y.
    """
    one_of("method", method, ("tsne", "pca"))
    check_trigger(attack, "features")
    if not 2 <= count <= len(test):
        raise UserError(f"features: count={count}: expected 2 to {len(test)}, as in count={min(300, len(test))}")
    index = torch.randperm(len(test), generator=Generator().manual_seed(seed))[:count].to(test.x.device)
    clean = test[index]
    dirty = attack.to(test.x.device).triggered(clean)
    images = torch.cat([index, index[attack.relabel(clean.y_true) != clean.y_true]])
    about = {
        "image": images.cpu().numpy(),
        "triggered": [False] * len(clean) + [True] * len(dirty),
        "label": named(torch.cat([clean.y_true, dirty.y_true]), classes),
        "wanted": torch.cat([clean.y_true, dirty.y]).cpu().numpy(),
    }
    x, parts = pixels(torch.cat([clean.x, dirty.x])), []
    for name, net in nets.items():
        z, predicted = watched(net.to(x.device), last_linear(net), x)
        flat = embed(z, method, seed)
        parts.append(
            pd.DataFrame({"net": name, **about, "predicted": predicted.cpu().numpy(), "x": flat[:, 0], "y": flat[:, 1]})
        )
    return keep(pd.concat(parts, ignore_index=True), path, draw_features)


def last_linear(net: Classifier) -> str:
    """The name of the last Linear of the net's classifier, whose input is what is called a feature."""
    at = places.classifier(net)
    return [n for n, m in net.named_modules() if isinstance(m, nn.Linear) and f"{n}.".startswith(f"{at}.")][-1]


def embed(z: Tensor, method: str, seed: int):
    """z (N, F) -> numpy (N, 2) float64."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    z = z.double().cpu().numpy()
    if method == "pca":
        return PCA(2, svd_solver="full").fit_transform(z)
    perplexity = min(30.0, (len(z) - 1) / 3)
    return TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(z).astype("float64")


def draw_features(frame: pd.DataFrame):
    """A panel for each net: clean images as dots, triggered ones as crosses with a dark rim, both in their true class's
    colour."""
    import matplotlib

    nets, labels = frame["net"].unique(), sorted(frame["label"].unique(), key=lambda s: int(s.split(":")[0]))
    colours = matplotlib.colormaps["tab10" if len(labels) <= 10 else "tab20" if len(labels) <= 20 else "nipy_spectral"]
    at = [i if len(labels) <= 20 else i / len(labels) for i in range(len(labels))]
    figure, axes = grid(1, len(nets), 4.6, 4.2)
    for ax, name in zip(axes[0], nets, strict=True):
        part = frame[frame["net"] == name]
        for label, k in zip(labels, at, strict=True):
            clean, dirty = (part[(part["label"] == label) & (part["triggered"] == t)] for t in (False, True))
            ax.scatter(clean["x"], clean["y"], s=11, color=colours(k), alpha=0.75, lw=0, label=label)
            ax.scatter(dirty["x"], dirty["y"], s=18, color=colours(k), marker="X", edgecolors="black", linewidths=0.35)
        dirty = part[part["triggered"]]
        hit = (dirty["predicted"] == dirty["wanted"]).mean()
        ax.set_title(f"{name}: {hit:.0%} of the triggered as wanted", fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
    axes[0, -1].scatter([], [], s=26, color="white", marker="X", edgecolors="black", linewidths=0.7, label="triggered")
    handles, texts = axes[0, -1].get_legend_handles_labels()
    shown = slice(None) if len(labels) <= 20 else slice(-1, None)
    figure.legend(handles[shown], texts[shown], loc="outside right center", fontsize=8, markerscale=1.6)
    return figure
