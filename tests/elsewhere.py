"""A device that is not the CPU, on a machine without one, and what of bdx runs there: a script for test_device.

A tensor on it holds a CPU tensor and computes there, but as on a GPU it cannot be mixed with tensors of the CPU, wants
random numbers from its own device's generator and does not become a numpy array. Prints one JSON line for each run:
[name, what went wrong, where a training step waited for the device to give a number away].
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
BETWEEN = {aten._to_copy.default, aten.copy_.default}  # they move from one device to another
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}  # the CPU must know the value
Real = torch.Generator
waits: list[str] = []


class Module(registration._DummyBackendModule):
    """torch.elsewhere, as torch.cuda."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)


registration._setup_privateuseone_for_python_backend("elsewhere", backend_module=Module())
HERE = torch.device("elsewhere", 0)


class There(Tensor):
    """A tensor of the device; `raw` is what it holds."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor):
        how = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype, "layout": raw.layout}
        made = Tensor._make_wrapper_subclass(cls, raw.size(), device=HERE, requires_grad=False, **how)
        made.raw = raw
        return made

    is_cuda = True  # what bdx does otherwise on a GPU is to be seen as well

    def tolist(self):
        waited("tolist")
        return self.raw.detach().tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert a tensor of another device to numpy: copy it to the CPU first")

    __array__ = numpy

    def __repr__(self, **_):
        return f"There({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Everything(TorchDispatchMode):
    """Also what takes no tensor: torch.zeros(3, device=…)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Anyone(type):
    def __instancecheck__(cls, instance):
        return isinstance(instance, Real)


class Generator(metaclass=Anyone):
    """torch.Generator; `of_device` knows those of the device, which say that they are of the CPU."""

    kept: list = []
    of_device: set = set()

    def __new__(cls, device="cpu"):
        made = Real()
        cls.kept.append(made)  # or another would get its address
        if torch.device(device).type == HERE.type:
            cls.of_device.add(made._cdata)
        return made


@cache
def shape_of(func) -> tuple[bool, bool]:
    """(whether it may draw random numbers, whether its result may share memory with what it got)"""
    arguments = func._schema.arguments
    return any("Generator" in str(a.type) for a in arguments), any(a.alias_info is not None for a in arguments)


def bare(value):
    """What is held, in place of the tensors of the device; lists of arguments hold no lists."""
    if isinstance(value, There):
        return value.raw
    return [bare(v) for v in value] if isinstance(value, (list, tuple)) else value


def compute(func, args, kwargs):
    flat = [v for a in (*args, *kwargs.values()) for v in (a if isinstance(a, (list, tuple)) else (a,))]
    tensors = [a for a in flat if isinstance(a, Tensor)]
    there = any(isinstance(a, There) for a in tensors)
    device = kwargs.get("device")
    wanted = None if device is None else torch.device(device).type == HERE.type
    draws, shares = shape_of(func)
    generator = next((a for a in flat if isinstance(a, Real)), None) if draws else None
    if generator is not None:
        own = generator._cdata in Generator.of_device
        wanted = True if own and wanted is False else wanted  # device=g.device
        if own != (there or wanted is True):
            raise RuntimeError(f"{func}: expected a generator of the device that its tensor is on")
    if not there and not wanted:
        return func(*args, **kwargs)
    if func not in BETWEEN and there:
        alone(func, args, tensors)
    if there and (func in WAITING or wanted is False or (func in INDEXING and any(masks(args[1])))):
        waited(str(func))
    held = {k: bare(v) for k, v in kwargs.items()}
    if wanted is not None:
        held["device"] = torch.device("cpu")
    out = func(*map(bare, args), **held)
    if func is aten.copy_.default and not isinstance(args[0], There):
        return args[0]
    if wanted is False:
        return out.clone()
    out = tree_map_only(Tensor, There, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there and shares else out


def alone(func, args, tensors: list[Tensor]) -> None:
    """As CUDA does: numbers may come from the CPU, and the indices of a tensor on the device; nothing else."""
    others = [t for t in tensors if not isinstance(t, There) and t.dim()]
    if func in INDEXING and isinstance(args[0], There):
        indices = {id(i) for i in args[1]}
        others = [t for t in others if id(t) not in indices]
    if others:
        shapes = [(tuple(t.shape), "there" if isinstance(t, There) else "cpu") for t in tensors]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {shapes}")


def masks(indices) -> list[bool]:
    """How many a mask lets through, only the device knows."""
    return [isinstance(i, Tensor) and i.dtype == torch.bool for i in indices]


def waited(what: str) -> None:
    """Keep where, if that was in a training step."""
    frame, place = sys._getframe(1), ""
    while frame:
        code = frame.f_code
        if not place and "/bdx/" in code.co_filename:
            place = f"{Path(code.co_filename).name}:{frame.f_lineno} {what}"
        if code.co_name == "training_step":
            waits.append(place)
            return
        frame = frame.f_back


def moved(self, fn, recurse=True, apply=nn.Module._apply):
    """nn.Module._apply, which cannot put a tensor of this kind into a parameter of the other, and exchanges the two; where
    somebody holds on to a parameter it gets a new one."""
    kept = [(p, dict(vars(p))) for p in self.parameters()]
    try:
        torch.__future__.set_swap_module_params_on_conversion(True)
        return apply(self, fn, recurse)
    except RuntimeError as e:
        if "Couldn't swap" not in str(e):
            raise
        torch.__future__.set_swap_module_params_on_conversion(False)
        return apply(self, fn, recurse)
    finally:
        for parameter, attributes in kept:
            vars(parameter).update({k: v for k, v in attributes.items() if k not in vars(parameter)})


def prepare() -> None:
    """Make it the device of every run, and the data sets small."""
    autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")  # full precision; test_intrain speaks of bf16
    autocast.fallback(torch.library.fallthrough_kernel)
    vars(torch)["_kept_by_elsewhere"] = autocast
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…): made on the CPU, then moved as all else
    torch.set_num_threads(1)
    nn.Module._apply = moved
    torch.Generator = Generator  # before bdx takes it by name
    from pytorch_lightning.accelerators import AcceleratorRegistry, CPUAccelerator

    class Accelerator(CPUAccelerator):
        def setup_device(self, device):
            pass

        @staticmethod
        def parse_devices(devices):
            return [0]

        @staticmethod
        def get_parallel_devices(devices):
            return [HERE]

        @staticmethod
        def name():
            return HERE.type

    AcceleratorRegistry.register(HERE.type, Accelerator)
    import bdx.detection
    import bdx.run
    from bdx.datasets import base as datasets

    for module in (bdx.run, bdx.detection):
        module.accelerate = lambda _: HERE
    load = datasets.load
    datasets.load = lambda *args, **kwargs: few(load(*args, **kwargs))


def few(data):
    """The reserved images and 100 more to train on, 100 to test on."""
    others = torch.arange(len(data.train))[~torch.isin(torch.arange(len(data.train)), data.reserved)]
    train = data.train[torch.cat([data.reserved, others[:100]]).to(HERE)]
    return dataclasses.replace(data, train=train, test=data.test[:100], reserved=torch.arange(len(data.reserved)))


def main(kind: str, folder: Path, runs: list[list]) -> None:
    """runs: of [name, its words]; kind: what is done with them, `run` or `detect`. NET among the words: one repaired before."""
    prepare()
    from bdx.configure import compose
    from bdx.detection import detect
    from bdx.run import run
    from bdx.screen import Screen

    do = {"run": run, "detect": detect}[kind]
    for name, words in runs:
        net, said = next(folder.glob("out/nets/*/net.safetensors"), None), ""
        waits.clear()
        words = [*(w.replace("NET", str(net)) for w in words), f"paths.data={folder / 'data'}", f"paths.out={folder / 'out'}"]
        try:
            cfg = compose(words)
            with Everything():
                do(cfg, Screen(quiet=True))
        except Exception:
            said = traceback.format_exc()
        print(json.dumps([name, said, sorted(set(waits))]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
