"""`python -m cifar.bench` on fewer images: to make and decode 30,000 takes longer than what a test looks at."""

import sys

FEW_IMAGES = (
    "from cifar.bench import context; context.IMAGES.update(train=2_500, test=500); "
    "import runpy; runpy.run_module('cifar.bench', run_name='__main__', alter_sys=True)"
)
BENCH = (sys.executable, "-c", FEW_IMAGES)
