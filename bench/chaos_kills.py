def disturb(world, report, rng, args): pass
def two_loops(world, report, rng, args): pass
