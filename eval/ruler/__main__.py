"""python -m eval.ruler"""

import sys

from eval.ruler.command import main

if __name__ == "__main__":
    sys.exit(main())
