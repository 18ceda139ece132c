"""How a GGUF file is called whose name the user has not given."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ggufmoe.export.requantize import COPY
from ggufmoe.files import allowed_name
from ggufmoe.quant.filetypes import FileType

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def model_name(source: str, quant: str, size: str | None = None) -> str:
    """``NAME-TYPE`` for what is made of ``source``, or ``NAME-SIZE`` where ``size`` is asked for.

    NAME is that of the directory, the recipe, the hub id or the GGUF file, without the number of a shard and, unless
    the types stay as they are, without the type that a GGUF file's name ends with. Raises OptionError for an unknown
    file type.
    """
    is_copy = quant.strip().upper() == COPY
    type_name = size or (COPY if is_copy else FileType.from_name(quant).name)
    path = Path(source)
    if path.suffix.lower() in (".gguf", ".yaml", ".yml"):
        name = _SHARD.sub("", path.stem)
    elif path.is_dir():
        name = Path(os.path.abspath(path)).name  # of a link as it was typed, and of "." as well
    else:
        name = path.name.partition("@")[0]  # org/name@revision
    if path.suffix.lower() == ".gguf" and not is_copy:
        types = "|".join((*FileType.__members__, "FP16", "FP32"))
        name = re.sub(rf"[-._]({types})$", "", name, flags=re.IGNORECASE) or name
    return allowed_name(f"{name}-{type_name}")
