"""Door of the command `python -m rae_jax.report`: see rae_jax.ui.report."""

from rae_jax.ui.report import main

if __name__ == "__main__":
    main()
