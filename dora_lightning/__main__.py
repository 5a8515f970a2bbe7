"""``python -m dora_lightning`` is the ``dora-lightning`` command."""

from dora_lightning.cli import main

if __name__ == "__main__":
    main()
