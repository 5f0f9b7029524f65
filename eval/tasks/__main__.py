"""python -m eval.tasks"""

import sys

from eval.tasks.command import main

if __name__ == "__main__":
    sys.exit(main())
