"""python -m eval.sparse_frontier"""

import sys

from eval.sparse_frontier.command import main

if __name__ == "__main__":
    sys.exit(main())
