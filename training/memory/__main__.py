"""python -m training.memory"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

from training.memory.command import main

if __name__ == "__main__":
    main()
