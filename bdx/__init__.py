"""bdx: train backdoored image classifiers, repair them, and measure how well the repair worked.

import bdx
net = bdx.load("outputs/nets/<id>")                       # a repaired net: pixels in [0,1] -> logits

from bdx.run import run
row = run(bdx.compose(["attack=blended", "defense=npd"]))  # one cell of a table
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
