"""The entry point: `python launch.py [OPTION=CHOICE …] [section.key=value …]`, `-m` for a sweep.

Of an installed package the same is `crl-exp launch …`.
"""

from __future__ import annotations

import sys

from crl_exp.launcher.app import main

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # in an import, where nothing was begun
        sys.exit(130)
