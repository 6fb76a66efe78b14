"""A GPU for machines without one: its tensors stay in the CPU's memory, say that they are on a GPU, and refuse to meet those that are not, as real
ones would. It finds a forgotten `.to(device)`, but not inside of backward; of a GPU's memory, kernels and speed it knows nothing."""

import contextlib
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, T = torch.device("cuda", 0), torch.Tensor
MAY_MIX = [T.copy_, T.is_set_to, T.data.__set__]
is_tensor = lambda x: isinstance(x, T)


class OnGPU(T):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is T.__deepcopy__:
            return args[1].setdefault(id(args[0]), moved(args[0], CUDA, clone=True))
        with torch._C.DisableTorchFunctionSubclass():
            if function == T.device.__get__:
                return CUDA
            if function == T.is_cuda.__get__:
                return True
            if function in (T.numpy, T.__array__):
                raise TypeError("numpy cannot see a GPU's memory")
            if function is T.__reduce_ex__:  # is written to a file as the CPU's: what reads it has to move it
                return on_cpu(args[0]).__reduce_ex__(*args[1:])
            indexed = function in (T.__getitem__, T.__setitem__) and isinstance(args[0], OnGPU)
            given = (args[0], *args[2:]) if indexed else args  # indices may be on the CPU
            tensors = list(filter(is_tensor, tree_leaves((given, kwargs))))
            sides = {isinstance(x, OnGPU) for x in tensors if x.ndim or isinstance(x, OnGPU)}  # a number may be anywhere
            if len(sides) > 1 and function not in MAY_MIX:
                raise RuntimeError(f"{function.__name__}: expected all tensors to be on the same device")
            return tree_map(lambda x: on_gpu(x) if is_tensor(x) else x, function(*args, **kwargs or {}))


on_gpu = lambda x: x if isinstance(x, OnGPU) else x.as_subclass(OnGPU)
on_cpu = lambda x: x.as_subclass(T) if isinstance(x, OnGPU) else x


def moved(x, device, clone=False):
    """`x` on `device`, with the same memory or with its own. What is a parameter stays one."""
    y = (on_gpu if device.type == "cuda" else on_cpu)(x.detach().clone() if clone else x.detach())
    return torch.nn.Parameter(y, x.requires_grad) if isinstance(x, torch.nn.Parameter) else y


def device_asked_for(function, args: tuple, kwargs: dict) -> torch.device | None:
    named = [kwargs["device"]] if kwargs.get("device") is not None else []
    if function in (T.to, torch.nn.Module.to):
        named += [x.device if is_tensor(x) else x for x in args[1:] if isinstance(x, (str, torch.device, T))]
    return torch.device("cpu" if function is T.cpu else named[0]) if named or function is T.cpu else None


class Factories(TorchFunctionMode):
    """Makes and moves tensors "on the GPU"."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (device := device_asked_for(function, args, kwargs)) is None:
            return function(*args, **kwargs)
        args, kwargs = tree_map(on_cpu, (args, kwargs))
        if device.type == "cuda" and kwargs.get("generator") is not None:
            raise RuntimeError("expected a generator on the GPU")
        if device.type == "cuda":
            here = lambda x: "cpu" if isinstance(x, (str, torch.device)) else x
            args, kwargs = tuple(map(here, args)), {name: here(x) for name, x in kwargs.items()}
        made = function(*args, **kwargs)
        return on_gpu(made) if device.type == "cuda" else made


def module_to(module, *args, **kwargs):
    """nn.Module.to, which would keep the parameters' class. Tied ones stay tied."""
    device, known = device_asked_for(torch.nn.Module.to, (module, *args), kwargs), {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, x in table.items():
                if x is not None:
                    table[name] = known.setdefault(id(x), (x, moved(x, device)))[1]
    return module


@contextlib.contextmanager
def a_gpu():
    with patch.object(torch.cuda, "is_available", lambda: True), patch.object(torch.nn.Module, "to", module_to), Factories():
        yield
