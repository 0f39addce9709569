"""Names that a measurement gives to its rows and stages, and by which its program finds them again.

A room of its own, because programs answer --help at once, and what they measure imports PyTorch and DALI.
"""

# benchmarks.cost
LOADER_STAGES = ("read", "decode", "resize", "mix", "normalise", "copy")
MODEL_STAGES = ("forward", "loss", "backward", "optimiser")
BEFORE, TODAY, NEAREST, LARGE = "9ac746d", "today", "nearest neighbour", "4000x3000 as it is"
# benchmarks.mix
FLOOR, NOTHING, ONE_PIXEL = "floor: copy", "nothing", "RandAugment of one pixel"
