"""The console command. Imports neither torch nor Lightning until a run starts."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path

from bdx.errors import UserError, nearest
from bdx.files import of_a_file, reason

HELP = """bdx: train backdoored image classifiers, repair them, and measure how well the repair worked

  bdx attack=NAME defense=NAME [dataset=NAME arch=NAME train=NAME] [key=value …]   one cell of a table
  bdx experiment=demo              a preset: a whole cell in a minute, nothing to download
  bdx -m attack=badnets,blended defense=ft,npd seed=0,1,2                          a grid, by Hydra's multirun
  bdx sweep PAPER/TABLE [scale=smoke|cpu|paper] [engine=local|slurm|ray] [--dry-run]   a paper's table; `bdx sweep --help`
  bdx table PAPER/TABLE [scale=…] [--format md|csv|tex|html]                       its rows beside the printed numbers
  bdx report PAPER/TABLE [scale=…] [logger=wandb] [--figures]                      the same with plots as one HTML page
  bdx dashboard PAPER/TABLE [scale=…] [logger.project=…]                           its runs as a W&B report
  bdx info [attacks|defenses|detectors|datasets|archs|layers]                      what there is
  bdx info triggers [dataset=NAME] [key=value …]   every trigger on real images: norms, PSNR, SSIM, and a picture of all
  bdx figure PAPER/FIG [scale=…] | NAME [RUN_ID] [key=value …]                     a paper's figure, of its runs or of one
  bdx detect detector=NAME attack=NAME [key=value …]                               which images carry a trigger?
  bdx data prepare NAME [key=value …] | bdx data list                              image caches
  bdx … --cfg job                  print the configuration instead of running it
  eval "$(bdx -sc install=bash)"   tab completion

A run that is done is not run again: its row is shown. Everything lies under ./outputs (BDX_OUT or paths.out), images
under ./data (BDX_DATA or paths.data). Exit codes: 0 done, 1 failed, 2 refused, 130 interrupted.
"""
COMMANDS = {  # word, and name of the function -> module
    "data": "data", "figure": "plates", "sweep": "sweep", "table": "tables", "report": "report", "detect": "detect",
    "dashboard": "dashboard",
}  # fmt: skip
HYDRAS_OWN = (
    "--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc", "--resolve", "--package", "-p",
)  # fmt: skip
REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip


def help() -> str:
    from bdx.configure import groups, options

    return HELP + "\n" + "\n".join(f"  {g:<11}{' '.join(options(g))}" for g in groups()) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Exit code 0 done, 1 failed, 2 refused (one line says why), 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGUSR2, interrupted)
    try:
        code = dispatch(argv)
        sys.stdout.flush()
        sys.exit(code)
    except UserError as e:
        print(f"bdx: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nbdx: interrupted; nothing half-written is left, the same command goes on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if not of_a_file(e) and e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        print(f"bdx: error: {e.filename2 or e.filename or 'output'}: {reason(e)}", file=sys.stderr)
        if not e.filename:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2 if e.errno in REFUSED else 1)


def interrupted(number, frame):
    raise KeyboardInterrupt


def dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help(), end="")
        return 0
    if argv[0] == "--version":
        from bdx import __version__

        print(f"bdx {__version__}")
        return 0
    if argv[0] == "info":
        if argv[1:2] == ["triggers"]:
            from bdx.triggers import triggers

            return triggers(argv[2:])
        from bdx.info import info

        return info(argv[1:])
    if argv[0] in COMMANDS:
        return getattr(import_module(f"bdx.{COMMANDS[argv[0]]}"), argv[0])(argv[1:])
    if any(a in ("-m", "--multirun") for a in argv):
        return multirun(argv)
    if any(a.split("=")[0] in HYDRAS_OWN for a in argv):
        if any(a.startswith(("-sc", "--shell-completion")) for a in argv):
            return complete(argv)
        from bdx.configure import compose

        words = [a for a in argv if is_word(a)]
        compose(words)  # Hydra would answer a mistake at length
        return hydra_main([*words, *(a for a in argv if not is_word(a))], lambda cfg: None)  # in one piece, as it wants
    if unknown := [a for a in argv if not is_word(a)]:
        near = nearest(unknown[0], ["info", *COMMANDS, "help"])
        raise UserError(f"{unknown[0]}: neither a command{near} nor key=value; `bdx --help` shows what there is")
    return single(argv)


def is_word(a: str) -> bool:
    """key=value or ~key, and no flag."""
    return a.startswith("~") or ("=" in a and not a.startswith("-"))


def single(argv: list[str]) -> int:
    from bdx.configure import compose

    cfg = compose(argv)
    show([execute(cfg)], cfg)
    return 0


def execute(cfg) -> dict:
    from bdx import results
    from bdx.screen import Screen

    screen = Screen()
    names = cfg.names
    screen.say(f"{names.attack} on {names.dataset}, {names.arch}, train={names.train}; then {names.defense}; seed {cfg.seed}")
    if row := results.finished(cfg):
        screen.say(results.DONE)
        if lacks := results.not_made(cfg, row["id"]):
            screen.say(lacks)
        return row
    from bdx.run import run

    try:
        return run(cfg, screen)
    except SystemExit:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from None


def show(rows: list[dict], cfg) -> None:
    from bdx import results
    from bdx.screen import Screen

    screen, nets = Screen(), Path(cfg.paths.nets).expanduser()
    screen.table(rows)
    for row in rows:
        picture = nets / f"{row['id']}.log" / "trigger.png"
        screen.places(row=results.path(Path(cfg.paths.results).expanduser(), row["id"]), net=nets / row["id"], picture=picture)


def multirun(argv: list[str]) -> int:
    """Hydra's multirun; a cell that fails is named at the end and does not stop the others."""
    from bdx.configure import compose, named
    from bdx.files import writable
    from bdx.multirun import cells_of, table_of

    if name := table_of(argv):
        cells, argv = cells_of(name, argv)
        first = compose(list(cells[0]))
    else:
        first = first_cell(argv)
    writable(Path(first.paths.out).expanduser(), "paths.out or BDX_OUT")
    done, failed = [], []

    def cell(cfg):
        from hydra.core.hydra_config import HydraConfig

        job = HydraConfig.get()
        try:
            named(cfg, dict(job.runtime.choices), list(job.overrides.task))
            done.append((execute(cfg), cfg))
        except Exception as e:
            if not isinstance(e, UserError) and not of_a_file(e):
                traceback.print_exc()
            failed.append(f"{' '.join(job.overrides.task)}: {e}")
            if "BasicLauncher" not in job.launcher._target_:
                raise

    hydra_main(argv, cell)
    if done:
        show([row for row, _ in done], done[0][1])
    for text in failed:
        print(f"bdx: failed: {text}", file=sys.stderr)
    return 1 if failed else 0


def first_cell(argv: list[str]):
    """Its configuration, once the words of the whole grid are known to be right."""
    from hydra import initialize_config_dir

    from bdx.configure import CONF, check, compose, one_of

    words = [a for a in argv if is_word(a)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        check(words)
    return compose(one_of(words))


def complete(argv: list[str]) -> int:
    """Hydra's tab completion, without base.yaml, which is what the choices of a group have in common and none itself."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        hydra_main(argv, lambda cfg: None)
    print(re.sub(r"\S+=base(\s|$)", "", said.getvalue()), end="")
    return 0


def hydra_main(argv: list[str], task) -> int:
    import hydra

    from bdx.configure import CONF

    sys.argv = [sys.argv[0], *argv]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    return 0


if __name__ == "__main__":
    main()
