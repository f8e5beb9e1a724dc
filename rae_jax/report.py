"""The command that writes the page of a run, or of several runs: see rae_jax.ui.report.

python -m rae_jax.report --workdir=DIR [--workdir=DIR ...] [--output=FILE.html]
"""

from rae_jax.ui.report import main

if __name__ == "__main__":
    main()
