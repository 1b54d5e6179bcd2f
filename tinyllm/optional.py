"""Import modules of extras/ and packages of requirements-extra.txt when an option needs them.

    formats = optional.load("formats")                              # the module extras/formats
    matplotlib = optional.require_package("matplotlib", "loss.png")

The four steps run without the folder extras/ and without these packages.
"""
import importlib
from types import ModuleType

from tinyllm.cli import UserError

# the purpose of each module of extras/
FEATURES = {
    "chat": "chat models (--interactive, --chat)",
    "compiled": "--compile in sample.py",
    "formats": "models of other projects",
    "fsdp": "--shard",
    "gpt2": "GPT-2",
    "plots": "loss.png",
    "tensor_parallel": "torchrun sample.py",
    "token_probs": "--show_probs, --logprobs and --score",
    "tokenizers": "tokenizers that are not SentencePiece",
}


def load(feature: str) -> ModuleType:
    """Import a module of extras/. Raises UserError if the folder is missing."""
    try:
        return importlib.import_module(f"extras.{feature}")
    except ModuleNotFoundError as error:
        if error.name not in ("extras", f"extras.{feature}"):
            raise
        raise UserError(f"the folder extras/ is missing; it is needed for {FEATURES[feature]}\n"
                        "       git checkout -- extras") from error


def require_package(package: str, purpose: str) -> ModuleType:
    """Import a package of requirements-extra.txt. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{purpose} needs the package {package}\n       pip install {package}") from error
