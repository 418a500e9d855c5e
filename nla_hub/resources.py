"""Where the data beside the code lies: recipes and model cards, in a checkout as in an installed wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nla_hub.errors import NLAError

PACKAGE = Path(__file__).resolve().parent


def data_directory(name: Literal["recipes", "model_cards"]) -> Path:
    """The directory `recipes/` or `model_cards/`: of the checkout where there is one, else of the wheel.

    Raises:
        NLAError: neither has it: an incomplete installation.
    """
    packaged = PACKAGE / f"{name}_data"  # pyproject.toml puts it there when a wheel is built
    checkout = PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    if packaged.is_dir():
        return packaged
    raise NLAError(
        f"This installation of nla-hub has no {name.replace('_', ' ')}.",
        where=PACKAGE,
        next_step="install it again: pip install --force-reinstall nla-hub",
    )
