"""Other PyTorch releases than the tested one, which requirements.txt installs.

Colab, clusters and rented machines have their own PyTorch. All releases from OLDEST_PYTORCH on work, except for two
options. A function here calls PyTorch's current function if it exists, otherwise the older one. No other file depends
on the release.

    python -m tinyllm.compat        # status 0 if the installed PyTorch works; used by quickstart.sh
"""
import inspect
import io
import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.serialization import StorageType

from tinyllm.cli import UserError, run_script

OLDEST_PYTORCH = (2, 6)              # 2.5 lacks torch.accelerator and torch.compiler.set_stance
OLDEST_FOR_EXPORT = (2, 8)          # with 2.6, torch.export fails in extras/compiled.py
OLDEST_FOR_SHARD = (2, 11)          # with 2.8, Muon fails on the sharded tensors of extras/fsdp.py
TESTED_PYTORCH = "2.13.0"           # as in requirements.txt


@cache
def check_pytorch() -> None:
    """Raise UserError if PyTorch is too old. Print a note, once, if the tests run with another release."""
    require_pytorch(OLDEST_PYTORCH)
    release = torch.__version__
    is_main = os.environ.get("RANK", "0") == "0"        # torchrun starts several processes
    if release.split("+")[0] != TESTED_PYTORCH and is_main:
        print(f"note: PyTorch {release}; the tests run with {TESTED_PYTORCH}", file=sys.stderr)


def require_pytorch(oldest: tuple[int, int], purpose: str = "") -> None:
    """Raise UserError if PyTorch is older than this release."""
    if torch.__version__ < oldest:
        needed = f" for {purpose}" if purpose else ""
        raise UserError(f"PyTorch {torch.__version__} is too old{needed}; expected {oldest[0]}.{oldest[1]} or newer\n"
                        "       pip install -r requirements.txt")


def cpu_features() -> dict[str, Any]:
    """Return the instruction sets of this CPU by name."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    return {"avx2": torch.cpu._is_avx2_supported(), "avx512_f": torch.cpu._is_avx512_supported(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx_bf16": torch.cpu._is_amx_tile_supported()}


def wrap_in_ddp(model: nn.Module) -> DistributedDataParallel:
    """Return the model in DDP, which averages its gradients and leaves its buffers alone."""
    has_new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if has_new_name else "broadcast_buffers"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{name: False})


@contextmanager
def gloo_prints_to_stderr() -> Iterator[None]:
    """Send stdout to stderr: gloo of PyTorch 2.8 prints a line when a process group starts, 2.11 prints none."""
    if torch.__version__ >= (2, 11):
        yield
        return
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


# ---- safe loading -------------------------------------------------------------------------------

def load_tensors(path: Path, mmap: bool) -> Any:
    """torch.load for tensors and plain values on the CPU; code in the file is never executed.

    Before PyTorch 2.10, a file could overwrite memory (CVE-2026-24747), so its structure is checked first.
    """
    if torch.__version__ < (2, 10):
        check_structure(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def check_structure(path: Path) -> None:
    """Raise an error for a file that sets items of anything but dicts, or declares data longer than the file's."""
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            archive = torch._C.PyTorchFileReader(str(path))
            StructureReader(io.BytesIO(archive.get_record("data.pkl")), archive).load()
            return
        file.seek(0)
        for _ in range(4):              # before 1.6: magic number, version, system, object
            StructureReader(file).load()


class Placeholder:
    """Stands for all objects that are neither plain values nor dicts."""

    def __init__(self, *args: Any):
        pass


class StructureReader(pickle._Unpickler):       # in Python: the one in C allocates as much as a damaged file asks for
    """Unpickle a file of torch.save with a Placeholder for each tensor."""

    def __init__(self, file: io.BufferedIOBase, archive: torch._C.PyTorchFileReader | None = None):
        super().__init__(file)
        self.archive = archive

    def find_class(self, module: str, name: str) -> type:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else type(name, (Placeholder,), {})

    def persistent_load(self, storage_id: tuple) -> Placeholder:
        """Check that a tensor's data is as long as declared. storage_id: ("storage", type, key, device, length)."""
        storage_type, key, _, length = storage_id[1:5]
        if self.archive:
            n_bytes = length * StorageType(storage_type.__name__).dtype.itemsize
            if n_bytes != len(self.archive.get_record(f"data/{key}")):
                raise ValueError(f"tensor {key} has {n_bytes} bytes in its header and another number in the file")
        return Placeholder()


if __name__ == "__main__":
    with redirect_stderr(sys.stdout):       # quickstart.sh shows notes, and hides errors
        run_script(check_pytorch)
