"""What all tests share: one thread a process, so that parallel tests do not fight over the cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported, also by the processes tests start
