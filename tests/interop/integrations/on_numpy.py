"""NumPy, in float32."""

import fit

fit.run("numpy", {"lars_update": (lambda: fit.function(fit.WEIGHTS), fit.function())})
