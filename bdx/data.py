"""`bdx data`: image caches, made and listed."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from bdx import imagefile
from bdx.configure import compose
from bdx.errors import UserError

HELP = """bdx data: image caches, of which every run reads

  bdx data list                              those below BDX_DATA or paths.data: sizes, classes, source, checksum
  bdx data prepare NAME [key=value …]        make one, downloading what is needed: bdx data prepare cifar10;
                                             bdx data prepare folder dataset.source.root=photos"""


def data(argv: list[str]) -> int:
    """`bdx data prepare NAME [key=value …]` and `bdx data list`."""
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return 0
    if argv[:1] == ["list"]:
        folder = Path(compose(argv[1:]).paths.data).expanduser()
        for path in sorted(folder.glob("*.safetensors")):
            print(line(path, imagefile.header(path)))
        if not any(folder.glob("*.safetensors")):
            print(f"no image caches in {folder}; `bdx data prepare NAME` makes one")
        return 0
    if argv[:1] != ["prepare"] or len(argv) < 2:
        raise UserError("expected `bdx data prepare NAME [key=value …]` or `bdx data list`")
    from bdx.build import instantiate

    cfg = compose([f"dataset={argv[1]}", *argv[2:]])
    maker = instantiate(OmegaConf.to_container(cfg.dataset.source, resolve=True))
    path = maker(Path(cfg.paths.data).expanduser())
    print(line(path, imagefile.header(path)))
    return 0


def line(path: Path, head: dict) -> str:
    (train, test), shape, k = head["sizes"], "×".join(map(str, head["shape"])), len(head["classes"])
    about = f"{train} + {test} images of {shape}, {k} classes"
    return f"{path}: {about}, {head['source']}, sha256 {head['sha256'][:12]}"
