"""python -m eval.ruler"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import sys

from eval.ruler.command import main

if __name__ == "__main__":
    sys.exit(main())
