"""Every defense on one backdoored net: seconds, memory, passes counted, and the whole over those passes bare."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from common import Figure, Place
from omegaconf import DictConfig
from passes import Count
from victim import victim

from bdx.configure import compose, options
from bdx.errors import UserError
from bdx.run import build_defense

BRIEF = {"epochs": 1, "warmup_epochs": 1, "teacher_epochs": 1}  # of every loop, unless asked for in full
MORE = {
    "dbd": ["defense.iterations=4"],
    "fp": ["defense.step=0.1"],
    "nc": ["defense.anomaly=0.0"],  # so that there is something to unlearn
}
APART = {
    "ibau": "gradients of gradients, which take longer: bench ibau",
    "cnpd_a": "its passes share their beginning: bench cnpd",
    "dp": "a gradient for each image",
}  # what the count does not fit


def parents() -> list[str]:
    """One name for each module: its own, or the first of its variants."""
    found = {}
    for name in options("defense"):
        stem = compose([f"defense={name}"]).defense._target_.split(".")[-2]
        if name == stem or (stem not in found and name.startswith(stem)):
            found[stem] = name
    return sorted(found.values())


def brief(node: DictConfig, prefix: str = "defense") -> list[str]:
    """Overrides that give each loop one epoch."""
    given = []
    for key, value in node.items():
        if isinstance(value, DictConfig):
            given += brief(value, f"{prefix}.{key}")
        elif key in BRIEF and value:
            given.append(f"{prefix}.{key}={BRIEF[key]}")
    return given


def one(place: Place, name: str, attack, data) -> Figure:
    plain = compose([f"defense={name}"])
    asked = [] if place.full else [*brief(plain.defense), *MORE.get(name, [])]
    warm, defense = (build_defense(compose([f"defense={name}", *asked]), attack) for _ in range(2))
    few = replace(data, train=data.train[:256], clean=data.clean[:256])
    count, seen = Count(), []
    if not (place.quick or place.full):  # kernels are chosen once for each shape
        warm.run(few.allow(warm.needs), place.trainer)
    work = partial(defense.run, data.allow(defense.needs), place.trainer)
    with count.watching():
        memory = place.peak(lambda: seen.append(place.seconds(work)))
    said = f"{memory:,.0f} MiB, images forward {count.forward:,}, backward {count.backward:,}"
    bare = count.bare(place.seconds, place.pick(1, 3, 5))
    if name in APART or bare < 0.2 * seen[0]:
        why = APART.get(name, "hardly any pass through a net")
        return Figure(f"{name}", seen[0], "s", note=f"{said}; {why}")
    aim = None if place.quick else 1.2  # starting a Trainer would be most of what --quick measures
    return Figure(f"{name}: over its bare passes", seen[0] / bare, "x", aim, True, f"{seen[0]:.1f} s, {said}")


def bench_defenses(place: Place) -> Iterator[Figure]:
    """Every defense, one of each module, on one backdoored net and 2,500 images: CIFAR-10's, where its cache is at hand."""
    repaired = victim(place)
    attack, data = repaired.attack, repaired.data
    yield Figure(f"defenses on {data.name}", len(data.clean), "images", note=repaired.about)
    left = {}
    for name in (names := parents()):
        try:
            yield one(place, name, attack, data)
        except UserError as e:
            left[name] = str(e)
    others = [n for n in options("defense") if n not in names]
    why = "; ".join(f"{n}: {e}" for n, e in left.items())
    epochs = "all epochs" if place.full else "one epoch of each loop"
    width = attack.net.spec["arch"]["width"]
    note = f"{epochs}, arch.width={width}; not run, as variants: {', '.join(others)}" + (f"; refused: {why}" if why else "")
    yield Figure("defenses run", len(names) - len(left), f"of {len(options('defense'))}", note=note)
