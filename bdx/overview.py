"""overview: what the README's tables say of the rows in experiments/results/, each made by one function. No torch in here."""

from __future__ import annotations

import csv
import textwrap
from collections import defaultdict
from functools import cache, partial
from statistics import mean

from bdx import grid, metrics, results
from bdx.chosen import PRESET, SCALE, Setting, first, made, of_today, settings, words
from bdx.comparison import printed, retrained
from bdx.composer import Composer
from bdx.configure import CONF, summary
from bdx.tables import number

OURS = "bdx/defenses"  # the table of which README.md shows what is measured
PAPERS = {"npd2023/table01": "NPD", "d32024/table01": "D3", "tnr2022/table01": "T&R"}
TO_ALL = "npd2023/table08"  # each class to the next
REPAIRS = ["attack, ACC / ASR before", "defense", "changed keys", "ACC / ASR / RA", "DER", "n", "in print: before → after, DER"]
LOOKS = ("L2", "L∞ of 255", "PSNR dB", "SSIM")  # columns of `bdx info triggers`
ALIKE = {"T&R": {"badnets": "badnet_white"}, "NPD": {"blend": "blended"}, "D3": {"blend": "blended"}}  # ours: the paper's


@cache
def of_paper(name: str) -> grid.Table:
    return grid.load(name)


@cache
def in_print() -> dict[tuple[str, str, str], dict[str, float]]:
    """(table, attack, defense) -> metric -> percent."""
    found: dict[tuple, dict[str, float]] = defaultdict(dict)
    for name in (*PAPERS, TO_ALL):
        for place, metric, value in printed(of_paper(name)):
            found[name, place["attack"], place["defense"]][metric] = value
    return found


def theirs(attack: str, defense: str, known: dict) -> str:
    """before → after, DER; from the paper that proposes the defense, else from the first that prints it."""
    own = [name for name in PAPERS if of_paper(name).claim["of"].get("defense") == defense]
    for name in (*own, *PAPERS):
        there = ALIKE[PAPERS[name]].get(attack, attack)
        before, after = known.get((name, there, "none"), {}), known.get((name, there, defense), {})
        if {"acc", "asr"} <= set(before) and {"acc", "asr"} <= set(after):
            numbers = before["acc"], before["asr"], after["acc"], after["asr"]
            der = after.get("der", 100 * metrics.der(*(n / 100 for n in numbers)))
            return "{}: {:.2f} / {:.2f} → {:.2f} / {:.2f}, {:.2f}".format(PAPERS[name], *numbers, der)
    return "–"


def repairs(rows: list[dict], current: set[str], composer: Composer) -> str:
    known = in_print()
    chosen, more = first(settings([r for r in rows if r["defense"] != "none"], current), composer)

    def lines(of: list[Setting]) -> list[list[str]]:
        made, last = [], None
        for s in of:
            before = f"`{s.attack}` {s.scores('acc_before', 'asr_before')}"  # a backdoor may have been trained twice
            changed = ", ".join(f"`{w.removeprefix('defense.')}`" for w in s.changed)
            after = s.scores("acc", "asr", "ra"), s.scores("der"), str(len(s.rows)), theirs(s.attack, s.defense, known)
            older = "" if all(r["id"] in current for r in s.rows) else " †"
            made.append(["" if before == last else before, f"`{s.defense}`{older}", changed, *after])
            last = before
        return made

    about = (
        f"{measured_on(rows, current)} Of each defense the setting of `scale={SCALE}` (a third of the papers' epochs) where "
        "it was measured, else that with the fewest changed keys, which the third column names; all others are folded below. "
        "n counts seeds, ± is their deviation. "
        "In print: full-size nets and recipes, which is another setting; for Trap-and-Replace also another net (WRN16-1) and "
        "trigger in place of `badnets` (`badnet_white`); beside `blend` NPD's and D3's Blended, which draws other images."
    )
    fold = ["", f"<details><summary>{len(more)} other settings of the same defenses</summary>", "", *rule(REPAIRS, lines(more))]
    about = textwrap.fill(about, 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join([about, "", *rule(REPAIRS, lines(chosen)), *([*fold, "", "</details>"] if more else [])])


def matrix(rows: list[dict], current: set[str], composer: Composer) -> str:
    """A line for each defense, a column for each attack of our own table."""
    axes = of_paper(OURS).axes
    chosen, _ = first(settings([r for r in rows if r["attack"] in axes["attack"]], current), composer)
    by = {(s.attack, s.defense): s for s in chosen}
    bare = settings([r | {"defense": "none"} for r in rows], current, own=lambda word: word.startswith("attack."))
    by |= {(s.attack, "none"): s for s in bare if not s.changed}

    def cell(s: Setting | None, defense: str) -> str:
        if s is None:
            return "–"
        if defense == "none":
            return s.scores("acc_before", "asr_before")
        older = "" if all(r["id"] in current for r in s.rows) else " †"
        return f"{s.scores('acc', 'asr')}, {s.scores('der')}{older}"

    lines = [[f"`{d}`", *(cell(by.get((a, d)), d) for a in axes["attack"])] for d in axes["defense"]]
    kept = [line for line in lines if set(line[1:]) != {"–"}]
    of = list({r["id"]: r for s in by.values() for r in s.rows}.values())
    twice = f" Nets {told}." if (told := retrained(of)) else ""
    several = any(len(s.rows) > 1 for s in chosen)
    spread = " With ± mean and deviation over several seeds, else of one: compare these with those by DER." if several else ""
    about = (
        f"{measured_on(of, current)} ACC / ASR, DER, of each defense at the setting of `scale={SCALE}` (a third of the papers' "
        f"epochs) where it was measured.{spread}{twice}"
    )
    about = textwrap.fill(about, 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join([about, "", *rule(["defense", *(f"`{a}`" for a in axes["attack"])], kept)])


def trigger_looks() -> dict[str, dict[str, str]]:
    """Backdoor, or attack with nothing changed -> its line in the tables of `bdx info triggers` that lie beside the rows."""
    found = {}
    for path in sorted((grid.EXPERIMENTS / "results").glob("triggers_*.csv")):
        with open(path, newline="") as file:
            for of in csv.DictReader(file):
                found |= {name: of for name in (of["backdoor"], "" if of.get("changed keys") else of["attack"]) if name}
    return found


def undefended(attack: str) -> str:
    """What the papers print for it before any repair."""
    prints = [(PAPERS[name], in_print().get((name, attack, "none"), {})) for name in PAPERS]
    if attack.endswith("_all2all"):
        prints.append(("NPD Table 8", in_print().get((TO_ALL, attack.removesuffix("_all2all"), "none"), {})))
    return "; ".join(f"{paper} {p['acc']:.2f} / {p['asr']:.2f}" for paper, p in prints if {"acc", "asr"} <= set(p))


def attacks(rows: list[dict], current: set[str], composer: Composer) -> str:
    """Nets before any repair, as the newest row of each backdoor and seed found them."""
    shown = LOOKS if (looks := trigger_looks()) else ()
    found = settings([r | {"defense": ""} for r in rows], current, own=lambda word: not word.startswith("defense."))
    head = ["attack", "changed keys", "ACC / ASR", *shown, "poisoned images", "seconds", "n", "in print: ACC / ASR"]
    lines = []
    for s in found:
        images = ", ".join(sorted({f"{r['n_poisoned']:,}" for r in s.rows}))
        seconds = f"{mean(r['seconds_attack'] for r in s.rows):.0f}"
        changed = ", ".join(f"`{w}`" for w in s.changed)
        names = (*(r.get("backdoor") for r in s.rows), None if s.changed else s.attack)
        of = next((looks[name] for name in names if name in looks), {})
        numbers = s.scores("acc_before", "asr_before"), *(of.get(k, "–") for k in shown), images, seconds, str(len(s.rows))
        lines.append([f"`{s.attack}`", changed, *numbers, undefended(s.attack) or "–"])
    about = (
        "The backdoors themselves, before any repair. Seconds are of one thread of busy CPUs of three makes, and of what is "
        "made beforehand where that was not there yet: only `make bench` compares."
    )
    return "\n".join([textwrap.fill(about, 120), "", *rule(head, lines)])


def detections(_rows: list[dict], _current: set[str], composer: Composer) -> str:
    """A line for each detector, a column for each attack, of the rows in results/detections that today's recipes make."""
    found = results.rows(grid.EXPERIMENTS / "results" / "detections")
    kept = [r for r in found if of_today(r, composer)]
    if not kept:
        return "No detection has been measured yet."
    names = sorted({r["attack"] for r in kept})
    lines: dict[tuple, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for r in kept:
        changed = ", ".join(f"`{w}`" for w in words(r))
        lines[f"`{r['detector']}`", changed, f"{r['judged']}, {r['n']:,}"][r["attack"]].append(r)

    def cell(seeds: list[dict]) -> str:
        if seeds and seeds[0]["judged"] == "net":
            return "; ".join(f"index {r['anomaly_index']:.2f}, flags {r['n_flagged']}" for r in seeds)
        scores = (number([r[k] for r in seeds if r[k] is not None], k) for k in ("auc", "tpr", "fpr"))
        return "{} ({} / {})".format(*scores) if seeds else "–"

    days = sorted(r["finished"][:10] for r in kept)
    about = (
        f"{len(kept)} rows, seed {told(kept, 'seed')}; {told(kept, 'device')}; torch {told(kept, 'torch')}; {days[0]} to "
        f"{days[-1]}. Which images carry a trigger? AUC (TPR / FPR at the method's own threshold) in percent; judged is the "
        "poisoned training set, or clean and triggered test images; or the net, by its largest anomaly index and how many "
        "classes it flags."
    )
    table = [[*of, *(cell(by[a]) for a in names)] for of, by in sorted(lines.items())]
    about = textwrap.fill(about, 120)
    return "\n".join([about, "", *rule(["detector", "changed keys", "judged", *(f"`{a}`" for a in names)], table)])


def elsewhere(_rows: list[dict], _current: set[str], composer: Composer) -> str:
    """A line for each setting that was measured on images other than the preset's, by a preset that its rows name: of any
    other nobody could say which command made it."""
    preset = composer.plain((f"experiment={PRESET}",))["names"]
    kept = [r for r in results.rows(grid.EXPERIMENTS / "results") if r["dataset"] != preset["dataset"] and "experiment" in r]
    if not kept:
        return "No row on other images has been measured yet."
    lines, current = [], {r["id"] for r in kept if made(r, composer) == r["id"]}
    where = lambda r: (r["dataset"], f"experiment={r['experiment']}", f"arch={r['arch']}", f"train={r['train']}")
    for name in sorted({where(r) for r in kept}):
        of = [r for r in kept if where(r) == name and r["defense"] != "none"]
        for s in settings(of, current):
            before, changed = (
                s.scores("acc_before", "asr_before"),
                ", ".join(f"`{w.removeprefix('defense.')}`" for w in s.changed),
            )
            older = "" if all(r["id"] in current for r in s.rows) else " †"
            head = ", ".join(f"`{part}`" for part in name), f"`{s.attack}` {before}", f"`{s.defense}`{older}", changed
            lines.append([*head, s.scores("acc", "asr", "ra"), s.scores("der"), str(len(s.rows))])
    days = sorted(r["finished"][:10] for r in kept)
    about = (
        f"{len(kept)} rows, seed {told(kept, 'seed')}; {told(kept, 'n_test')} test images; {told(kept, 'device')}; torch "
        f"{told(kept, 'torch')}; {days[0]} to {days[-1]}. In percent.{outdated(kept, current)}"
    )
    head = ["images, net, recipe", "attack, ACC / ASR before", *REPAIRS[1:-1]]
    return "\n".join([textwrap.fill(about, 120), "", *rule(head, lines)])


def told(rows: list[dict], key: str) -> str:
    return ", ".join(sorted({f"{r[key]:,}" if isinstance(r[key], int) else str(r[key]) for r in rows}))


def measured_on(rows: list[dict], current: set[str]) -> str:
    """n, hardware, versions and dates of the rows."""
    of = partial(told, rows)
    days = sorted(r["finished"][:10] for r in rows)
    what = summary(CONF / "experiment" / f"{PRESET}.yaml").partition(": ")[2].partition(";")[0]
    about = (
        f"`experiment={PRESET}`, {what}: {len(rows)} rows, seed "
        f"{of('seed')}; {of('n_test')} test images, {of('n_reserved')} reserved; "
        f"{'; '.join(sorted({r['device'] for r in rows}))}; torch {of('torch')}; {days[0]} to {days[-1]}. In percent."
    )
    return about + outdated(rows, current)


def outdated(rows: list[dict], current: set[str]) -> str:
    if not (old := sum(r["id"] not in current for r in rows)):
        return ""
    return (
        f" {old} of them, marked †, were measured before something in their recipe changed: no command of today makes their "
        "ids, so `bdx table` leaves them out."
    )


def rule(head: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


MAKERS = {
    f"{PRESET}_matrix": matrix, f"{PRESET}_detections": detections, PRESET: repairs, f"{PRESET}_attacks": attacks,
    "other_images": elsewhere,
}  # fmt: skip
