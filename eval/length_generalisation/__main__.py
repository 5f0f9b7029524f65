"""python -m eval.length_generalisation"""

import sys

from eval.length_generalisation.command import main

if __name__ == "__main__":
    sys.exit(main())
