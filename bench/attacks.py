"""Each attack that controls the training: its step over a plain one."""

from collections.abc import Iterator
from functools import partial

from common import Figure, Place, versus

from bdx.attacks.base import Attack

# most a step may cost, and what makes the only epoch one of the kind that is long
STEPS = {
    "wanet": (1.25, []),
    "bpp_controlled": (1.25, []),
    "input_aware": (2, []),  # stage 2
    "lira": (None, ["attack.joint=1.0"]),  # stage 1
    "blind": (None, []),
}


def bench_controlled(place: Place) -> Iterator[Figure]:
    """Training steps in which the attacker has a hand, over plain ones."""
    data, width = place.images(128 * (steps := place.pick(2, 4, 100))), 64 if place.gpu else 16
    how = [f"arch.width={width}", "train.epochs=1"]
    plain = place.attack(data, "attack=badnets", *how)
    for name, (aim, more) in STEPS.items():
        attack = place.attack(data, f"attack={name}", *how, *more)
        if name == "blind":
            attack.recent.zero_()  # the task is learned, the backdoor is on
        runs = [partial(Attack.fit, one, data, place.trainer) for one in (attack, plain)]
        ours, least = place.race(place.pick(1, 3, 5), *runs)
        yield versus(f"{name}: over a plain step", ours, least, steps, aim=aim, less=aim is not None)
