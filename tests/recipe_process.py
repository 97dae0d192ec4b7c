"""A recipe that does not take its time to measure speed: `recipe_process.py RECIPE FLAGS...`."""

import runpy
import sys

from ofb_hf.workflow import measure

if __name__ == "__main__":
    measure.SECONDS_PER_ROUND = 0.0
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
