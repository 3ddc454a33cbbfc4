"""The folder of a model by its name, for what must not import mlx: data.check and the PyTorch script.

A folder is itself. Any other name (an embedded model, one on the hub) is left to a process that runs models.locate.
"""

import os
import subprocess
import sys
from pathlib import Path

from common.errors import UserError
from common.files import expanded

ROOT = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, "-m", "models.locate")


def locate(name: str) -> Path:
    """The local folder of the model `name`, built or downloaded first if necessary.

    Raises UserError as `models.loading.resolve` does, and if the process itself fails.
    """
    folder = expanded(name)
    if (folder / "config.json").is_file():
        return folder
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Progress goes to stderr; stdout ends with the folder or, with exit code 2, the error message.
    process = subprocess.run(
        [*COMMAND, name], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    last = (process.stdout.splitlines() or [""])[-1]
    if process.returncode == 2 and last:
        raise UserError(last)
    if process.returncode or not last:
        raise UserError(f"{name} could not be located (see above); that takes mlx: pip install -r requirements.txt")
    return Path(last)
