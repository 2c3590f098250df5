"""The fast engine's producers: raw forwards and backwards with the adapters' terms fused in.

Unlike the ops of `fastsft_kernels` these are not differentiable: a block's autograd function calls
them in its forward and its backward. Each takes `backend` and has a reference of the same name
and signature in `fastsft_kernels.reference`. Outputs may be given, at any row pitch.

R is the width of a strip: an adapter's rank, rounded up to a multiple of 16. Adapters that share
an input (q, k, v; gate, up) lie side by side in strips of one width, so S strips make S·R columns.
"""
