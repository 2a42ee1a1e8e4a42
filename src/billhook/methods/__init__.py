"""Every method, one file each: its facts, its settings, its part in a prune.  A new one is a file and a line below.

adapruner    samples and metric are searched, then as fasp
admm         zeros: mask and least squares in turns
auto         the best of layerchop, fasp and experts by held-out windows, refined
bolaco       weights become two thin ones, and a search says which kinds keep how much
experts      fewer experts in a mixture
factored     what methods that factor weights have in common
fasp         the units of an axis that matter least go, and what reads the axis is refitted
fistapruner  zeros: another method's, refined by a convex problem
gated        what methods whose gates learn have in common
gates        the units whose gates are lowest go, learned with the weights frozen, then as fasp
goa          modules are refitted to their unpruned outputs, then what puts out least goes
l0           random gates learn beside adapters, and the units likeliest to be closed go
layerchop    whole decoder layers go
lorc         a smaller KV cache: narrower values, by depth
loraprune    units go while adapters train, by the adapters' gradients
magnitude    zeros: the smallest weights
minutes      what auto may spend, and what each part of it costs
mlpruning    units of lowest score go, as many of each axis as it learns to, beside adapters
mope         the modules that are missed least go, then as fasp
narrowed     settings of cuts that refit what stays
optishear    zeros: by a score whose parts are searched
policy       the units whose chances to stay are lowest go, by losses of masks, then as fasp
rivals       the ways to cut that auto tries
rom          the last layers' weights become two thin ones
searched     settings of a search
slicegpt     a narrower residual stream
softtopk     the channels that a task misses least go, by a mask that learns, then as fasp
sparsegpt    zeros: column by column, and the weights to the right make up for it
trials       cuts as auto would make them, on a few windows, and which is best
wanda        zeros: by the size of a weight times the norm of its input
zeros        what methods that make zeros have in common
"""

from billhook.methods import (
    adapruner,
    admm,
    auto,
    bolaco,
    experts,
    fasp,
    fistapruner,
    gates,
    goa,
    l0,
    layerchop,
    loraprune,
    lorc,
    magnitude,
    mlpruning,
    mope,
    optishear,
    policy,
    rom,
    slicegpt,
    softtopk,
    sparsegpt,
    wanda,
)
from billhook.planning.method import Method, flaw
from billhook.runtime import plug_ins

OWN: dict[str, Method] = {
    method.name: method
    for method in (
        auto.METHOD,
        fasp.METHOD,
        mope.METHOD,
        policy.METHOD,
        gates.METHOD,
        softtopk.METHOD,
        loraprune.METHOD,
        l0.METHOD,
        mlpruning.METHOD,
        adapruner.METHOD,
        layerchop.METHOD,
        experts.METHOD,
        slicegpt.METHOD,
        goa.METHOD,
        lorc.METHOD,
        rom.METHOD,
        bolaco.METHOD,
        magnitude.METHOD,
        wanda.METHOD,
        optishear.METHOD,
        sparsegpt.METHOD,
        fistapruner.METHOD,
        admm.METHOD,
    )
}
METHODS: dict[str, Method] = plug_ins.added("methods", OWN, flaw)
