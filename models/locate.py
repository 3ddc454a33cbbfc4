"""Print the folder of a model, built or downloaded first if necessary: common.locate's other half.

    python -m models.locate tiny-digits

A user's mistake is printed on stdout as well, with exit code 2.
"""

import sys

from models import cpu

if __name__ == "__main__":
    cpu.enable()  # before mlx is imported

from common.errors import UserError
from models.loading import resolve


def main() -> None:
    try:
        print(resolve(sys.argv[1]))
    except UserError as error:
        print(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
