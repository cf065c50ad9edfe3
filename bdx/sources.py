"""What images are made from: archives of a known checksum, image files of any size, read by many threads, and arrays of a
user's, in which a pickle is refused unread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import BadZipFile

from bdx.errors import UserError


def fetch(folder: Path, name: str, archives: dict[str, tuple[str, str]], about: str) -> list[Path]:
    """Paths of `archives` (file -> address, MD5) in `folder`, each downloaded unless it is there whole. about: how much, for
    whoever waits. Raises UserError, with what would do without a network."""
    from torchvision.datasets.utils import download_url

    print(f"{name}: downloading to {folder} ({about}, once)", flush=True)
    try:
        for file, (url, md5) in archives.items():
            download_url(url, folder, file, md5)
    except (OSError, RuntimeError) as e:
        raise no_network(name, e, [f"{file} (from {url})" for file, (url, _) in archives.items()], folder) from None
    return [folder / file for file in archives]


def no_network(name: str, error: Exception, files: Sequence[str], folder: Path, cache: str | None = None) -> UserError:
    return UserError(
        f"{name} could not be downloaded ({error}); without a network put {' and '.join(files)} or a ready cache "
        f"{cache or name}.safetensors into {folder}, or name the folder that has it by BDX_DATA or paths.data"
    )


def read(file, size: int, gap: float | None):
    """-> (3, size, size) uint8; the image is scaled as a whole, not cropped. file: a path or a stream; gap: Pillow's
    reducing_gap, which makes large photos small in two steps."""
    import numpy as np
    from PIL import Image

    with Image.open(file) as image:
        if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would clip instead of scaling
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, reducing_gap=gap)
    return np.asarray(small).transpose(2, 0, 1)


def stack(names: Sequence, size: int, *, open: Callable = lambda name: name, gap: float | None = None):
    """(N, 3, size, size) uint8 of the images `open(name)`. Raises UserError that names every unreadable one."""
    import numpy as np
    from PIL.Image import DecompressionBombError
    from rich.progress import track

    images, broken = np.empty((len(names), 3, size, size), np.uint8), []

    def take(i: int) -> None:
        try:
            images[i] = read(open(names[i]), size, gap)
        except (OSError, ValueError, SyntaxError, DecompressionBombError, KeyError) as e:
            broken.append((i, f"{names[i]} ({e})"))

    with ThreadPoolExecutor() as pool:
        for _ in track(pool.map(take, range(len(names))), f"reading {len(names)} images", len(names), transient=True):
            pass
    if broken:
        said = [text for _, text in sorted(broken)]
        more = f" and {len(said) - 5} more" if len(said) > 5 else ""
        raise UserError(f"unreadable images: {'; '.join(said[:5])}{more}; remove or replace them")
    return images


def generated(file: str, shape: tuple[int, int, int], classes: int):
    """x (N,C,H,W) uint8 and y (N,) int64 of a .npz with X (N,H,W,C) uint8 and Y (N,), as CIFAR-5m's. Raises
    UserError unless images and labels are such as the data set's."""
    import numpy as np

    key = f"dataset.reserved.generated={file}"
    try:
        with np.load(Path(file).expanduser(), allow_pickle=False) as arrays:
            x, y = arrays["X"], arrays["Y"]
    except FileNotFoundError:
        raise UserError(f"{key}: there is no such file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadZipFile) as e:
        raise UserError(f"{key}: expected a .npz with images X (N,H,W,C) and labels Y (N,): {e}") from None
    (c, h, w), n = shape, len(x) if x.ndim else 0
    if x.dtype != np.uint8 or x.shape != (n, h, w, c) or y.shape != (n,) or y.dtype.kind not in "iu":
        found = f"X {x.dtype} {x.shape}, Y {y.dtype} {y.shape}"
        raise UserError(f"{key}: expected X uint8 (N, {h}, {w}, {c}) and Y whole numbers (N,), found {found}")
    if n and not 0 <= y.min() <= y.max() < classes:
        raise UserError(f"{key}: its labels go from {y.min()} to {y.max()}, expected 0 to {classes - 1}")
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), y.astype(np.int64)
