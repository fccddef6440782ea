"""How the bundled backbone was taught: `python -m server pretrain`."""
