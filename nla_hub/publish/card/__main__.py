"""`python -m nla_hub.publish.card NAME`: a generated card on standard output."""

from __future__ import annotations

import sys

from nla_hub.errors import NLAError
from nla_hub.publish.card import recipe_card, tiny_card


def main(arguments: list[str]) -> int:
    """Print the card of a recipe, or of the packaged pair; exit status."""
    name = arguments[0] if arguments else "tiny"
    try:
        print(tiny_card() if name == "tiny" else recipe_card(name), end="")
    except NLAError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
