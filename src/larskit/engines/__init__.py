"""Where the rule runs.

An engine is two functions for one group of arrays of one device and dtype:

* ``lengths(arrays)`` returns their Euclidean lengths as a wide 1-d array;
* ``step_(weights, gradients, buffers, lr, config, norms=None)`` moves the weights in
  place and returns `larskit.rule.Lengths` of 1-d arrays, one number per layer.

``buffers`` is a list with None for each layer without a momentum buffer; where the
momentum is not 0, the engine puts the new buffer there. ``norms`` is the pair
``(|w|, |measured|)`` where somebody has found it already.
"""
