"""What makes one weight sparse, by the name of its method."""

from billhook.math import admm, fistapruner, magnitude, optishear, sparsegpt, wanda
from billhook.math.layerwise import Prune

SOLVERS: dict[str, Prune] = {
    "magnitude": magnitude.prune,
    "wanda": wanda.prune,
    "optishear": optishear.prune,
    "sparsegpt": sparsegpt.prune,
    "fistapruner": fistapruner.prune,
    "admm": admm.prune,
}
