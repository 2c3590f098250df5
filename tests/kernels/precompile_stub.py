"""Records a few ops, compiles what they launch ahead, then launches it with a driver that runs nothing.

    python precompile_stub.py [NUMBER]      NUMBER: of a kernel that is left out of what is compiled ahead

Prints one line of JSON. Run with TRITON_INTERPRET unset and a fresh TRITON_CACHE_DIR.
"""

import json
import sys
from types import SimpleNamespace

import torch
from fastsft_kernels import rms_norm, swiglu
from fastsft_kernels.launch import record_launches
from fastsft_kernels.precompile import Misses, Precompile, TargetDriver, recipes
from triton.runtime import driver

run = []


class Launcher:
    def __init__(self, src, metadata):
        self.name = metadata.name

    def __call__(self, *args):
        run.append(self.name)


class StubDriver(TargetDriver):
    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda *given: (1, 1, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
    )


def record():
    """Sizes that are divisible by 16, that are not, and a row of one."""
    with record_launches() as recording:
        for rows, columns in ((64, 256), (33, 200), (1, 256)):
            x = torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
            rms_norm(x, torch.empty(columns, dtype=torch.bfloat16, device="meta"), 1e-6)
            swiglu(x, torch.empty_like(x))
        swiglu(x[:, 1:129], x[:, 3:131])  # pointers that are not aligned
    return recording.launches


def real(value):
    """The same tensor with memory, as far from an aligned address as the recorded one."""
    if not isinstance(value, torch.Tensor):
        return value
    memory = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8)
    whole = torch.empty(0, dtype=value.dtype).set_(memory.untyped_storage())
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


driver.set_active(StubDriver(90))
launches = record()
every = recipes(launches)
left_out = list(map(int, sys.argv[1:]))
done = Precompile([r for i, r in enumerate(every) if i not in left_out], workers=2)
result = done.join()
done.close()
misses = Misses()
for launch in launches:
    launch.kernel[launch.grid](*map(real, launch.args), **launch.options)
misses.close()
print(
    json.dumps(
        {
            "recipes": [recipe.name for recipe in every],
            "compiled": result.kernels,
            "problems": result.problems,
            "misses": misses.names,
            "launches": len(launches),
            "run": len(run),
        }
    )
)
