"""bdx: train backdoored image classifiers, repair them, and measure how well the repair worked.

    import bdx
    net = bdx.load("outputs/nets/<id>")                       # a repaired net: pixels in [0,1] -> logits
    row = bdx.run(bdx.compose(["attack=blended", "defense=npd"]))
"""

__version__ = "0.1.0"


def load(folder):
    """The net that a run saved in `folder`; see bdx.archs.base.load."""
    from bdx.archs.base import load

    return load(folder)


def compose(overrides=()):
    """The configuration of one run; see bdx.configure.compose."""
    from bdx.configure import compose

    return compose(list(overrides))


def run(cfg):
    """One cell of a table, or its row if it is there; see bdx.run.run."""
    from bdx.run import run

    return run(cfg)
