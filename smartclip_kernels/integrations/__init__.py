"""Drop-ins for the codebases that people already have: one module each, which imports its package and nobody else's.

`open_clip`, `transformers` and `sentence_transformers` stand for the packages of those names; `smartclip` puts a mask
head on a CLIP of open_clip or transformers. None is imported by smartclip_kernels itself.
"""

from __future__ import annotations

from importlib import import_module

from torch.torch_version import TorchVersion


def require(package: str, least: str, extra: str) -> None:
    """Import `package`, of which `least` is the first version that will do, or say which extra installs it.

    Raises:
        ImportError: it is missing, or too old.
    """
    remedy = f"pip install 'smartclip-kernels[{extra}]'"
    try:
        module = import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise  # the package is there, something that it needs is not
        raise ImportError(f"{package}: not installed, needs {least} or later: {remedy}", name=package) from error
    if TorchVersion(module.__version__) < least:
        raise ImportError(f"{package}: got {module.__version__}, needs {least} or later: {remedy}", name=package)
