"""Print the folder of a model, built or downloaded first if necessary: common.locate's other half.

    python -m models.locate tiny-digits

A user's mistake is printed on stdout as well, with exit code 2.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import cpu

if __name__ == "__main__":
    cpu.enable()  # before mlx is imported

from common.errors import UserError
from common.parser import Parser
from models.loading import resolve


def main() -> None:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("name", metavar="MODEL", help="embedded model, Hugging Face name, folder or GGUF file")
    name = parser.parse_args().name
    try:
        print(resolve(name))
    except UserError as error:
        print(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
