"""python -m eval.length_generalisation"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import sys

from eval.length_generalisation.command import main

if __name__ == "__main__":
    sys.exit(main())
